"""Decoders that were saved without their heads, as embedding models such as Qwen3-Embedding are."""

from collections.abc import Sequence

from pagedcore.execution.checkpoint import Checkpoint

_FIRST = "embed_tokens.weight"
"""The first tensor of a decoder, below whatever holds it."""


def complete(checkpoint: Checkpoint) -> bool:
    """Let a decoder without a head look like one whose head is its embedding; whether it was one.

    Its tensors lack the "model." that stands before those of a whole model, and its architecture
    may be named Qwen3Model in place of Qwen3ForCausalLM. It cannot generate, head or no head.
    """
    stored = checkpoint.stored
    if _FIRST not in stored or any(name.startswith("model.") for name in stored):
        return False
    checkpoint.stored = {f"model.{name}": tensor for name, tensor in stored.items()}
    config = {**checkpoint.config, "tie_word_embeddings": True}
    names = config.get("architectures")
    if isinstance(names, Sequence) and names and isinstance(names[0], str):
        name = names[0]
        if name.endswith("Model"):
            config["architectures"] = [name.removesuffix("Model") + "ForCausalLM"]
    checkpoint.config = config
    return True
