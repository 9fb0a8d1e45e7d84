"""What formats of 4 and 8 bits have in common: how parts become a matrix, and what cannot.

    T tokens   E experts   F expert width   h hidden size

A format says how one part of a matrix is stored. Parts of one kind become one matrix; others stay
apart, and are multiplied one after the other. Experts are widened to 16 bits while loading.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
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
    UnquantizedExperts,
    UnquantizedLinear,
    join_rows,
)
from pagedcore.execution.torch_quantized import widen_grouped
from pagedcore_quantization.experts import take_wide_experts
from pagedcore_quantization.fp8 import take_bias
from pagedcore_quantization.modules import Modules

logger = logging.getLogger(__name__)

Part = Grouped | Tensor
"""A part of a matrix: packed, or [rows, columns] in the model's type where it cannot be."""


class GroupedLinear:
    """A packed matrix: weight [out, in], bias [out] or None."""

    def __init__(self, ops: Ops, weight: Grouped, bias: Tensor | None, dtype: torch.dtype) -> None:
        """`dtype` is that of activations."""
        self._ops = ops
        self._weight = weight
        if not weight.codes.is_meta:
            self._weight = ops.pack_grouped(_plainest(weight), dtype)
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
        """See `Quantizer.experts`: experts are widened to the model's type while loading."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning("%s: experts are widened to %s", self.name, weights.dtype)

        def take(name: str, rows: int, columns: int, dim: int) -> Tensor:
            if self.keeps(name):
                return weights.take(f"{name}.weight", (rows, columns), dim=dim)
            part = self.part(weights, name, rows, columns, dim)
            return part if isinstance(part, Tensor) else widen_part(part, weights.dtype)

        return UnquantizedExperts(ops, take_wide_experts(take, prefix, num_experts, h, width))


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


def widen_part(weight: Grouped, dtype: torch.dtype) -> Tensor:
    """What a part stands for, its columns in the order of the inputs: [out, in] in `dtype`."""
    if weight.codes.is_meta:
        return torch.empty(weight.shape, dtype=dtype, device="meta")
    wide = widen_grouped(weight, dtype)
    return wide if weight.order is None else wide[:, weight.order.argsort()]


def _plainest(weight: Grouped) -> Grouped:
    """The same weight in less memory: scales in 16 bits, and no zeros, where that changes nothing.

    A weight without zeros has those of a symmetric one.
    """
    zero = weight.zero
    if zero is not None and bool((zero == 2 ** (weight.bits - 1)).all()):
        zero = None
    for dtype in (torch.float16, torch.bfloat16):
        scale = weight.scale.to(dtype)
        if torch.equal(scale.float(), weight.scale):
            return replace(weight, zero=zero, scale=scale)
    return replace(weight, zero=zero)
