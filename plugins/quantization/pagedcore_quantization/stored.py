"""Checkpoints whose matrices are stored in 8 bits.

    E experts   F expert width   h hidden size   G groups of inputs that share a scale

Whatever the checkpoint's scales belong to, a matrix has one for each output afterwards, or one for
each output and group of inputs: so parts that have scales of their own become one matrix as they
are, without being rounded again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.expert_ops import Experts
from pagedcore.execution.model import Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import FLOAT8, GROUP_COLUMNS
from pagedcore.execution.quantizer import (
    ExpertsMethod,
    LinearMethod,
    Unquantized,
    UnquantizedExperts,
    join_rows,
)
from pagedcore.execution.torch_quantized import widen
from pagedcore_quantization.formats import read_format
from pagedcore_quantization.fp8 import Fp8Linear, join_float8, take_bias

_UNUSED = ("input_scale", "input_scale_ub", "k_scale", "v_scale", "q_scale", "output_scale")
"""Scales of activations and of cached keys and values: see `formats`."""


class StoredFp8:
    """A `Quantizer` for checkpoints that a quantization_config describes."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raises ModelError, naming the field, for settings that are not understood."""
        self.name = name
        self._format = read_format(name, settings)

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
        """See `Quantizer.experts`: experts are widened to the model's type while loading."""
        gate_up: Tensor | None = None
        down: Tensor | None = None
        for e in range(num_experts):  # filled one by one, so that no expert is in memory twice
            gate = self._take_wide(weights, f"{prefix}.{e}.gate_proj", width, h)
            if gate_up is None or down is None:
                gate_up = gate.new_empty(num_experts, 2 * width, h)
                down = gate.new_empty(num_experts, h, width)
            gate_up[e, :width] = gate
            gate_up[e, width:] = self._take_wide(weights, f"{prefix}.{e}.up_proj", width, h)
            down[e] = self._take_wide(weights, f"{prefix}.{e}.down_proj", h, width)
        assert gate_up is not None, "a mixture has at least one expert"
        assert down is not None
        return UnquantizedExperts(ops, Experts(gate_up=gate_up, down=down))

    def _take(
        self, weights: Weights, name: str, rows: int, columns: int, dim: int | None
    ) -> tuple[Tensor, Tensor]:
        """A part's numbers [rows, columns] in 8 bits, and its scales [rows, G]."""
        for unused in _UNUSED:
            weights.ignore(f"{name}.{unused}")
            weights.ignore(f"{name.rpartition('.')[0]}.{unused}")
        values = weights.take(f"{name}.weight", (rows, columns), dtype=FLOAT8, dim=dim)
        scale = self._take_scale(weights, name, rows, columns, dim)
        return values, _repeat_rows(scale, len(values), self._rows_per_scale(scale, rows))

    def _take_scale(
        self,
        weights: Weights,
        name: str,
        rows: int,
        columns: int,
        dim: int | None,
    ) -> Tensor:
        """A part's scales as they are stored: [rows, 1], [1, 1], or one for each block."""
        if self._format.scales == "block":
            shapes: list[tuple[int, ...]] = [(_blocks(rows), _blocks(columns))]
        else:
            shapes = [(rows, 1), (1,), (), (rows,), (1, 1)]
            dim = 0 if dim == 0 else None
        found = _take_any(weights, f"{name}.{self._format.suffix}", shapes, dim)
        return found if found.ndim == 2 else found.reshape(-1, 1)

    def _rows_per_scale(self, scale: Tensor, rows: int) -> int:
        if self._format.scales == "block":
            return GROUP_COLUMNS
        return rows if len(scale) == 1 else 1

    def _take_wide(self, weights: Weights, name: str, rows: int, columns: int) -> Tensor:
        """A part in the model's type."""
        if self._format.kept.holds(name):
            return weights.take(f"{name}.weight", (rows, columns))
        values, scale = self._take(weights, name, rows, columns, None)
        if values.is_meta:
            return torch.empty((rows, columns), dtype=weights.dtype, device="meta")
        return widen(values, scale, weights.dtype)


def _blocks(size: int) -> int:
    return -(-size // GROUP_COLUMNS)


def _repeat_rows(scale: Tensor, rows: int, times: int) -> Tensor:
    """[n, G] as [rows, G], each row `times` times."""
    if scale.is_meta:
        return torch.empty((rows, scale.shape[1]), dtype=scale.dtype, device="meta")
    return scale.repeat_interleave(times, 0)[:rows].contiguous()


def _take_any(
    weights: Weights,
    name: str,
    shapes: Sequence[tuple[int, ...]],
    dim: int | None,
) -> Tensor:
    """A tensor of one of some shapes; the first says what is expected if it has none of them."""
    first: ModelError | None = None
    for shape in shapes:
        try:
            return weights.take(
                name, shape, dtype=torch.float32, dim=dim if len(shape) == 2 else None
            )
        except ModelError as error:
            first = first or error
    assert first is not None, "there is a shape to try"
    raise first
