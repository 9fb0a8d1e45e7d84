"""Read an adapter (LoRA) as PEFT saves it: adapter_config.json and adapter_model.safetensors.

Nothing in the files is trusted: every tensor must be the A or B of a layer that the model has, with
the shape that the layer and the rank give it, before anything is allocated for it.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.adapter_pool import AdapterMatrices
from pagedcore.execution.checkpoint import FLOATS
from pagedcore.execution.safetensors_file import StoredTensor, read_header
from pagedcore.execution.weight_reader import WeightReader

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MAX_JSON_BYTES = 1 << 20
_PREFIX = "base_model.model."
_MOST_NAMED = 4

_MUST_BE_UNSET = {
    "use_dora": "DoRA scales the whole matrix",
    "use_qalora": "QALoRA pools the inputs",
    "lora_bias": "biases are not adapted",
    "modules_to_save": "it holds whole layers beside the adapter",
    "rank_pattern": "all layers must have one rank",
    "alpha_pattern": "all layers must have one alpha",
    "target_parameters": "experts are not adapted",
    "trainable_token_indices": "the embedding is not adapted",
    "layer_replication": "the model's layers are what they are",
    "alora_invocation_tokens": "the whole prompt is adapted",
}
"""Fields that make an adapter something else than B A beside a layer, and what they do."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, in the host's memory."""

    key: str
    """Identifies its content: the same in every process, whatever the adapter is called."""

    rank: int
    num_bytes: int
    matrices: Mapping[str, AdapterMatrices]
    """By the names that the checkpoint has for the parts of layers; in the model's type."""


def read_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    max_rank: int,
    dtype: torch.dtype,
    lock_pages: bool,
) -> Adapter:
    """Read an adapter for a model whose layers have `shapes`: inputs and outputs by name.

    Raises ModelError for what is missing, broken, of another model, of a larger rank, or more than
    an adapter of linear layers.
    """
    config = _read_config(folder / CONFIG)
    rank, scale = _rank_and_scale(config, folder, max_rank)
    stored = _find_tensors(folder)
    pairs = _pair(stored, folder, shapes, rank)
    reader = WeightReader(torch.device("cpu"), (), ahead=False)
    try:
        num_elements = sum(math.prod(tensor.shape) for tensor in stored.values())
        memory = torch.empty(num_elements, dtype=dtype, pin_memory=lock_pages)
        at = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal at
            place = memory[at : at + tensor.numel()].view(tensor.shape)
            at += tensor.numel()
            return place.copy_(tensor)

        matrices = {
            name: AdapterMatrices(
                keep(reader.read(a)), keep(reader.read(b).to(torch.float32).mul_(scale))
            )
            for name, (a, b) in sorted(pairs.items())
        }
    finally:
        reader.close()
    if not bool(memory.isfinite().all()):
        raise ModelError(f"the adapter in {folder} holds NaN or infinity, or is beyond {dtype}.")
    digest = hashlib.sha256(repr([*matrices, rank, str(dtype)]).encode())
    digest.update(memory.view(torch.uint8).numpy().data)
    return Adapter(digest.hexdigest(), rank, memory.nbytes, matrices)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror or error}. An adapter is a folder with "
            f"{CONFIG} and {TENSORS}, as PEFT saves it."
        ) from None
    if len(content) > MAX_JSON_BYTES:
        raise ModelError(f"{path} has more than {MAX_JSON_BYTES} bytes; no adapter needs that.")
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} must hold a JSON object: {error}.") from None


def _rank_and_scale(config: dict[str, Any], folder: Path, max_rank: int) -> tuple[int, float]:
    """The rank, and what B A counts."""
    kind, bias = config.get("peft_type"), config.get("bias", "none")
    if kind != "LORA":
        raise ModelError(f"{folder / CONFIG}: peft_type must be 'LORA', not {kind!r:.80}.")
    if bias != "none":
        raise ModelError(f"{folder / CONFIG}: bias must be 'none', not {bias!r:.80}.")
    for name, reason in _MUST_BE_UNSET.items():
        if config.get(name):
            raise ModelError(f"{folder / CONFIG}: {name} is not supported: {reason}.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ModelError(f"{folder / CONFIG}: r must be a positive integer, not {rank!r:.80}.")
    if type(alpha) not in (int, float) or not math.isfinite(float(alpha)):  # type: ignore[arg-type]
        raise ModelError(f"{folder / CONFIG}: lora_alpha must be a number, not {alpha!r:.80}.")
    if rank > max_rank:
        raise ModelError(
            f"the adapter in {folder} has the rank {rank}, and at most {max_rank} is taken: "
            "raise --max-lora-rank"
        )
    root = math.sqrt(rank) if config.get("use_rslora") is True else rank
    return rank, float(alpha) / root  # type: ignore[arg-type]


def _find_tensors(folder: Path) -> dict[str, StoredTensor]:
    path = folder / TENSORS
    if not path.exists():
        pickled = "adapter_model.bin is a pickle, which is not read: save it as safetensors."
        remedy = pickled if (folder / "adapter_model.bin").exists() else "Fetch it again."
        raise ModelError(f"{folder} has no {TENSORS}. {remedy}")
    return read_header(path)


def _pair(
    stored: Mapping[str, StoredTensor],
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """A and B by the names of layers."""
    found: tuple[dict[str, StoredTensor], dict[str, StoredTensor]] = ({}, {})
    strange = []
    for full_name, tensor in stored.items():
        module, _, kind = full_name.removeprefix(_PREFIX).rpartition(".lora_")
        if kind not in ("A.weight", "B.weight") or module not in shapes:
            strange.append(full_name)
            continue
        inputs, outputs = shapes[module]
        expected = (rank, inputs) if kind[0] == "A" else (outputs, rank)
        if tensor.shape != expected:
            raise ModelError(
                f"the adapter in {folder} is for another model: {full_name!r:.200} must have the "
                f"shape {list(expected)}, and has {list(tensor.shape)}."
            )
        if tensor.dtype not in FLOATS.values():
            raise ModelError(f"{full_name!r:.200} in {folder} must be floats, not {tensor.dtype}.")
        found["AB".index(kind[0])][module] = tensor
    if strange:
        names = ", ".join(f"{name!r:.200}" for name in strange[:_MOST_NAMED])
        raise ModelError(
            f"the adapter in {folder} has {len(strange)} tensors that belong to no linear layer "
            f"of this model: {names}. It is for another architecture, or adapts more than linear "
            "layers."
        )
    alone = found[0].keys() ^ found[1].keys()
    if alone or not stored:
        what = f"only one of A and B of {min(alone)!r:.200}" if alone else "no tensors"
        raise ModelError(f"the adapter in {folder} has {what}. Fetch it again.")
    return {name: (found[0][name], found[1][name]) for name in found[0]}
