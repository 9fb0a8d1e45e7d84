"""Tensors as a format stores them, and what a quantizer makes of them at a start."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.model import Weights
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.quantizer_case import QuantizerCase

NOT_EQUAL = 1e-4
"""Products of numbers around 1 that differ by more in float32 are not those of equal matrices."""

Method = TypeVar("Method")


def stored(case: QuantizerCase, name: str, matrix: Tensor) -> dict[str, Tensor]:
    """A layer's tensors, by their whole names."""
    parts = {"weight": matrix} if case.store is None else case.store(matrix)
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def without(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """All but one."""
    return {other: tensor for other, tensor in tensors.items() if other != name}


def load(
    take: Callable[[Weights], Method], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Method:
    """What `take` makes of a checkpoint: of shapes alone first, then of weights, as a start does.

    Raises what a start would for tensors that are missing, left over, or of another shape.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="pagedcore-quantizer-kit-") as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, folder / "model.safetensors")
        checkpoint = Checkpoint(folder)
        take(checkpoint.shapes(dtype))
        checkpoint.check_all_taken()
        weights = checkpoint.tensors(dtype, torch.device("cpu"))
        with torch.inference_mode():
            method = take(weights)
        weights.finish()
    return method


def bytes_kept(method: object, ops: TorchOps) -> int:
    """Bytes of all tensors that a method holds on to, those of `ops` aside."""
    sizes = {}
    for tensor in _tensors_of(method, {id(ops)}):
        place = id(tensor) if tensor.is_mkldnn else tensor.data_ptr()  # a layout without an address
        sizes[place] = tensor.numel() * tensor.itemsize
    return sum(sizes.values())


def _tensors_of(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that an object holds on to, through its attributes and containers."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    if isinstance(thing, type | ModuleType | FunctionType):
        return
    if isinstance(thing, Mapping):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        parts = list(thing)
    else:
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [getattr(thing, name) for name in slots if hasattr(thing, name)]
        parts += list(getattr(thing, "__dict__", {}).values())
    for part in parts:
        yield from _tensors_of(part, seen)
