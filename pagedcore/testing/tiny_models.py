"""Model folders that take milliseconds to run: random weights, made and saved by transformers.

Weights are drawn so that logits differ clearly, and biases and norms do something: a test that
compares tokens would not notice a layer that the usual initialisation leaves without effect.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pagedcore.testing.model_case import BEGIN, END, SIZES, VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["BEGIN", "END", "SIZES", "VOCAB_SIZE", "greedy_tokens", "save_tiny_model"]

MIXTURE: dict[str, Any] = dict(
    num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
)
"""Further fields of a mixture of experts."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def save_tiny_model(
    folder: Path,
    family: str | Mapping[str, Any] = "llama",
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
    dtype: torch.dtype = torch.float32,
    reference: str = "AutoModelForCausalLM",
    **fields: Any,
) -> "PreTrainedModel":
    """Save a model of a family with a tokenizer, and return it as transformers runs it, in float32.

    `family` is llama, mistral, qwen2, qwen3 or qwen3_moe, or the fields of a config.json, such as
    `ModelCase.config`; `fields` replace some of those. `max_shard_size` such as "50KB" cuts the
    weights into several files. `reference` is the class of transformers that makes the model.
    """
    import transformers

    classes: Any = getattr(transformers, reference)
    torch_state = torch.get_rng_state()
    model: Any = classes.from_config(tiny_config(family, **fields), dtype=torch.float32)
    torch.set_rng_state(torch_state)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            # Norms begin at one or, where one is added to them, at zero:
            mean = float(weight.mean().round()) if weight.dim() == 1 else 0.0
            weight.normal_(mean, 0.2, generator=generator)
            weight.copy_(weight.to(dtype))  # what the file holds, the returned model computes with
    model.eval()
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    if getattr(model, "generation_config", None) is not None:  # an encoder has none
        model.generation_config.eos_token_id = None  # `greedy_tokens` goes on after an end
        model.generation_config.pad_token_id = END
    whole: PreTrainedModel = model.float()
    return whole


def tiny_config(family: str | Mapping[str, Any], **fields: Any) -> "PreTrainedConfig":
    """The configuration of a tiny model; `fields` replace those of the family."""
    from transformers import (
        AutoConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    if isinstance(family, Mapping):
        config: PreTrainedConfig = AutoConfig.for_model(**{**family, **fields})
        return config
    families: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
        "llama": (LlamaConfig, {}),
        "mistral": (MistralConfig, {"sliding_window": None}),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 32}),
        "qwen3_moe": (Qwen3MoeConfig, {"head_dim": 32, **MIXTURE}),
    }
    kind, own = families[family]
    return kind(**SIZES | own | fields)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: a token is a byte, or the begin or end of a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def greedy_tokens(model: "PreTrainedModel", prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What transformers generates at temperature 0, after a model that `save_tiny_model` made."""
    ids = torch.tensor([list(prompt)])
    generate: Any = model.generate
    out = generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
