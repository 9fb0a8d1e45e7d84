"""Adapter folders with random numbers, as PEFT saves them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagedcore.execution.safetensors_file import DTYPES

DEVIATION = 0.2
"""Of every number: large enough that an adapter changes what is said."""


def save_drawn_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    alpha: float = 8,
    use_rslora: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> dict[str, Tensor]:
    """Save an adapter of layers with these inputs and outputs, and return what it adds to each.

    `fields` are further ones of adapter_config.json. The changes [out, in] are float32.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for name, (inputs, outputs) in shapes.items():
        a, b = (
            torch.empty(shape).normal_(0.0, DEVIATION, generator=generator).to(dtype)
            for shape in ((rank, inputs), (outputs, rank))
        )
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        changes[name] = scale * (b.float() @ a.float())
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    _save_tensors(tensors, folder / "adapter_model.safetensors")
    return changes


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As a safetensors file, where that library need not be."""
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        dtype = next(short for short, known in DTYPES.items() if known == tensor.dtype)
        offsets = [at, at + tensor.nbytes]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def linear_shapes(model: torch.nn.Module, *names: str) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers whose last name is one of `names`."""
    return {
        name: (int(layer.in_features), int(layer.out_features))
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] in names
    }
