"""Checkpoints whose matrices are stored in 8 bits.

    E experts   F expert width   h hidden size   G groups of inputs that share a scale

Whatever the checkpoint's scales belong to, a matrix has one for each output afterwards, or one for
each output and group of inputs: so parts that have scales of their own become one matrix as they
are, without being rounded again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pagedcore.execution.model import Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import FLOAT8, GROUP_COLUMNS, Grouped
from pagedcore.execution.quantizer import (
    ExpertsMethod,
    LinearMethod,
    Unquantized,
    join_rows,
)
from pagedcore.execution.torch_quantized import widen
from pagedcore_quantization.experts import make_experts
from pagedcore_quantization.formats import StoredFormat
from pagedcore_quantization.fp8 import Fp8Linear, join_float8, take_bias
from pagedcore_quantization.packing import Part

_UNUSED = (
    *("input_scale", "input_scale_ub", "input_zero_point", "activation_scale"),
    *("k_scale", "v_scale", "q_scale", "output_scale"),
)
"""Scales of activations and of cached keys and values: see `formats`."""


class StoredFp8:
    """A `Quantizer` for checkpoints that a quantization_config describes."""

    def __init__(self, name: str, stored: StoredFormat) -> None:
        self.name = name
        self._format = stored

    def linear(
        self,
        weights: Weights,
        ops: Ops,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool,
        dim: int | None,
    ) -> LinearMethod:
        """See `Quantizer.linear`."""
        if self._format.kept.holds_all(names):
            return Unquantized().linear(
                weights, ops, names, in_features, out_features, bias=bias, dim=dim
            )
        parts = [
            self._take(weights, name, rows, in_features, dim)
            for name, rows in zip(names, out_features, strict=True)
        ]
        values, scales = zip(*parts, strict=True)
        added = take_bias(weights, names, out_features, dim=dim) if bias else None
        return Fp8Linear(ops, join_float8(values), join_rows(scales), added)

    def experts(
        self, weights: Weights, ops: Ops, prefix: str, num_experts: int, h: int, width: int
    ) -> ExpertsMethod:
        """See `Quantizer.experts`."""

        def take(name: str, rows: int, columns: int, dim: int) -> Part:
            return self.take_part(weights, name, rows, columns, dim)

        return make_experts(ops, take, prefix, num_experts, h, width, weights.dtype)

    def _take(
        self, weights: Weights, name: str, rows: int, columns: int, dim: int | None
    ) -> tuple[Tensor, Tensor]:
        """A part's numbers [rows, columns] in 8 bits, and its scales [rows, G]."""
        ignore_unused(weights, name)
        values = weights.take(f"{name}.weight", (rows, columns), dtype=FLOAT8, dim=dim)
        scale = self._take_scale(weights, name, rows, columns, dim)
        return values, _repeat_rows(scale, len(values), self._rows_per_scale(scale, rows))

    def _take_scale(
        self, weights: Weights, name: str, rows: int, columns: int, dim: int | None
    ) -> Tensor:
        """A part's scales as they are stored: [rows, 1], [1, 1], or one for each block."""
        names = [f"{name}.{suffix}" for suffix in self._format.suffixes]
        name = next((each for each in names if weights.has(each)), names[0])
        if self._format.scales == "block":
            shape = _blocks(rows), _blocks(columns)
            return weights.take(name, shape, dtype=torch.float32, dim=dim)
        return _take_any(weights, name, [(rows, 1), (1,), (), (rows,), (1, 1)], dim)

    def _rows_per_scale(self, scale: Tensor, rows: int) -> int:
        if self._format.scales == "block":
            return GROUP_COLUMNS
        return rows if len(scale) == 1 else 1

    def take_part(
        self, weights: Weights, name: str, rows: int, columns: int, dim: int | None
    ) -> Part:
        """The layer `name` [rows, columns] of an expert: wide where rows have no whole blocks."""
        if self._format.kept.holds(name):
            return weights.take(f"{name}.weight", (rows, columns), dim=dim)
        values, scale = self._take(weights, name, rows, columns, dim)
        if values.shape[1] % scale.shape[1] == 0:
            return Grouped(values.view(torch.uint8), scale, 8, float8=True)
        if values.is_meta:
            return torch.empty(values.shape, dtype=weights.dtype, device="meta")
        return widen(values, scale, weights.dtype)


def _blocks(size: int) -> int:
    return -(-size // GROUP_COLUMNS)


def _repeat_rows(scale: Tensor, rows: int, times: int) -> Tensor:
    """[n, G] as [rows, G], each row `times` times."""
    if scale.is_meta:
        return torch.empty((rows, scale.shape[1]), dtype=scale.dtype, device="meta")
    return scale.repeat_interleave(times, 0)[:rows].contiguous()


def take_scales(
    weights: Weights, name: str, rows: int, groups: int, dim: int | None, *, own: int
) -> Tensor:
    """The scales of the layer `name` as [own, groups] float32, whatever they belong to.

    `own` is how many of the rows this rank has.
    """
    ignore_unused(weights, name)
    name = f"{name}.weight_scale"
    if groups > 1:
        return weights.take(name, (rows, groups), dtype=torch.float32, dim=dim)
    scale = _take_any(weights, name, [(rows, 1), (1,), (), (rows,), (1, 1)], dim)
    return _repeat_rows(scale, own, own if len(scale) == 1 else 1)


def ignore_unused(weights: Weights, name: str) -> None:
    """Say that the layer's scales of activations and of the cache are not needed."""
    for unused in _UNUSED:
        weights.ignore(f"{name}.{unused}")
        weights.ignore(f"{name.rpartition('.')[0]}.{unused}")


def _take_any(
    weights: Weights, name: str, shapes: Sequence[tuple[int, ...]], dim: int | None
) -> Tensor:
    """Scales of one of some shapes, with two dimensions; the first is what an error expects."""
    stored = weights.stored_shape(name)
    shape = shapes[0] if stored is None or stored not in shapes else stored
    share = dim if shape == shapes[0] and dim == 0 else None
    found = weights.take(name, shape, dtype=torch.float32, dim=share)
    return found if found.ndim == 2 else found.reshape(-1, 1)
