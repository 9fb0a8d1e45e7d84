"""What formats of 4 and 8 bits have in common: how parts become a matrix, and what cannot.

    T tokens   E experts   F expert width   h hidden size

A format says how one part of a matrix is stored. Parts of one kind become one matrix; others stay
apart, and are multiplied one after the other. What becomes of experts: see `experts`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pagedcore.execution.model import Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import Activations, Grouped, join_grouped
from pagedcore.execution.quantizer import (
    ExpertsMethod,
    LinearMethod,
    Unquantized,
    UnquantizedLinear,
    join_rows,
)
from pagedcore_quantization.experts import GroupedExperts, make_experts
from pagedcore_quantization.fp8 import take_bias
from pagedcore_quantization.modules import Modules
from pagedcore_quantization.packing import Part, plainest

logger = logging.getLogger(__name__)


class GroupedLinear:
    """A packed matrix: weight [out, in], bias [out] or None."""

    def __init__(self, ops: Ops, weight: Grouped, bias: Tensor | None, dtype: torch.dtype) -> None:
        """`dtype` is that of activations."""
        self._ops = ops
        self._weight = weight
        if not weight.codes.is_meta:
            self._weight = ops.pack_grouped(plainest(weight), dtype)
        self._bias = bias

    def apply(self, x: Activations) -> Tensor:
        """See `LinearMethod.apply`."""
        assert isinstance(x, Tensor), "nobody asked for 8 bits"
        return self._ops.grouped_linear(x, self._weight, self._bias)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `LinearMethod.wants_quantized`."""
        return False


class SplitLinear:
    """Matrices that are stored in several ways, with the same input."""

    def __init__(self, methods: Sequence[LinearMethod]) -> None:
        self._methods = methods

    def apply(self, x: Activations) -> Tensor:
        """See `LinearMethod.apply`."""
        return torch.cat([method.apply(x) for method in self._methods], -1)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `LinearMethod.wants_quantized`."""
        return False


class PackedFormat(ABC):
    """A `Quantizer` for checkpoints whose matrices are stored as `Grouped` ones can be."""

    def __init__(self, name: str, kept: Modules) -> None:
        """`kept` are the layers that were left in 16 bits."""
        self.name = name
        self._kept = kept
        self._has_warned = False

    @abstractmethod
    def part(self, weights: Weights, name: str, rows: int, columns: int, dim: int | None) -> Part:
        """Take the layer `name`, [rows, columns] as it is multiplied with."""

    def keeps(self, name: str) -> bool:
        """Whether the layer `name` was left in 16 bits."""
        return self._kept.holds(name)

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
        kept = [self.keeps(name) for name in names]
        if all(kept):
            return Unquantized().linear(
                weights, ops, names, in_features, out_features, bias=bias, dim=dim
            )
        parts: list[Part] = [
            weights.take(f"{name}.weight", (rows, in_features), dim=dim)
            if as_it_is
            else self.part(weights, name, rows, in_features, dim)
            for name, rows, as_it_is in zip(names, out_features, kept, strict=True)
        ]
        has_bias = bias or all(weights.has(f"{name}.bias") for name in names)
        added = take_bias(weights, names, out_features, dim=dim) if has_bias else None
        return make_linear(ops, parts, added, weights.dtype)

    def experts(
        self, weights: Weights, ops: Ops, prefix: str, num_experts: int, h: int, width: int
    ) -> ExpertsMethod:
        """See `Quantizer.experts`."""

        def take(name: str, rows: int, columns: int, dim: int) -> Part:
            if self.keeps(name):
                return weights.take(f"{name}.weight", (rows, columns), dim=dim)
            return self.part(weights, name, rows, columns, dim)

        method = make_experts(ops, take, prefix, num_experts, h, width, weights.dtype)
        was_packed = not self.keeps(f"{prefix}.0.down_proj")
        if was_packed and not self._has_warned and not isinstance(method, GroupedExperts):
            self._has_warned = True
            logger.warning("%s: experts are widened to %s", self.name, weights.dtype)
        return method


def make_linear(
    ops: Ops, parts: Sequence[Part], bias: Tensor | None, dtype: torch.dtype
) -> LinearMethod:
    """One matrix of parts below each other; with bias [out], or None."""
    packed = [part for part in parts if isinstance(part, Grouped)]
    if not packed:
        wide = [part for part in parts if isinstance(part, Tensor)]
        return UnquantizedLinear(ops, join_rows(wide), bias)
    joined = join_grouped(packed) if len(packed) == len(parts) else None
    if joined is not None:
        return GroupedLinear(ops, joined, bias, dtype)
    ends = list(accumulate(part.shape[0] for part in parts))
    return SplitLinear(
        [
            make_linear(
                ops, [part], None if bias is None else bias[end - part.shape[0] : end], dtype
            )
            for part, end in zip(parts, ends, strict=True)
        ]
    )
