"""Weights of 8 bits: rounded while they are loaded, and multiplied by the backend.

    T tokens   E experts   F expert width   h hidden size   G groups of inputs that share a scale

Each output of a matrix gets a scale of its own, so that its largest weight becomes the largest
number of 8 bits. A part is rounded as soon as it is read: no more than one part of one matrix is
in memory in 16 bits. Embeddings, the head, norms and routers keep their type.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pagedcore.execution.model import Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import FLOAT8, Activations, Grouped
from pagedcore.execution.quantizer import (
    ExpertsMethod,
    LinearMethod,
    join_rows,
)
from pagedcore_quantization.experts import make_experts
from pagedcore_quantization.packing import Part


class Fp8:
    """A `Quantizer` for checkpoints of 16 bits."""

    name = "fp8"

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
        values, scales = [], []
        for name, rows in zip(names, out_features, strict=True):
            wide = weights.take(f"{name}.weight", (rows, in_features), dim=dim)
            if wide.is_meta:
                values.append(torch.empty(wide.shape, dtype=FLOAT8, device="meta"))
                scales.append(torch.empty((len(wide), 1), device="meta"))
            else:
                rounded = ops.quantize(wide)
                values.append(rounded.values)
                scales.append(rounded.scale)
        added = take_bias(weights, names, out_features, dim=dim) if bias else None
        return Fp8Linear(ops, join_float8(values), join_rows(scales), added)

    def experts(
        self, weights: Weights, ops: Ops, prefix: str, num_experts: int, h: int, width: int
    ) -> ExpertsMethod:
        """See `Quantizer.experts`."""

        def take(name: str, rows: int, columns: int, dim: int) -> Part:
            wide = weights.take(f"{name}.weight", (rows, columns), dim=dim)
            if wide.is_meta:
                scale = torch.empty((len(wide), 1), device="meta")
                codes = torch.empty(wide.shape, dtype=torch.uint8, device="meta")
                return Grouped(codes, scale, 8, float8=True)
            rounded = ops.quantize(wide)
            return Grouped(rounded.values.view(torch.uint8), rounded.scale, 8, float8=True)

        return make_experts(ops, take, prefix, num_experts, h, width, weights.dtype)


class Fp8Linear:
    """A matrix of 8 bits: weight [out, in] float8, scale [out, G] float32, bias [out] or None."""

    def __init__(self, ops: Ops, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self._ops = ops
        self._weight = weight
        # a group's scales lie together: so they are read, and multiplied with by libraries
        self._scale = scale if scale.is_meta else scale.t().contiguous().t()
        self._bias = bias

    def apply(self, x: Activations) -> Tensor:
        """See `LinearMethod.apply`."""
        return self._ops.scaled_linear(x, self._weight, self._scale, self._bias)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `LinearMethod.wants_quantized`."""
        return self._ops.wants_quantized(num_tokens, self._weight, self._scale, dtype)


def take_bias(
    weights: Weights, names: Sequence[str], out_features: Sequence[int], *, dim: int | None
) -> Tensor:
    """The parts' biases, one after the other: [out]."""
    share = 0 if dim == 0 else None
    parts = zip(names, out_features, strict=True)
    return join_rows([weights.take(f"{name}.bias", (rows,), dim=share) for name, rows in parts])


def join_float8(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of 8 bits below each other; as bytes, for which every device can do it."""
    if len(parts) == 1 or parts[0].is_meta:
        return join_rows(parts)
    return join_rows([part.view(torch.uint8) for part in parts]).view(FLOAT8)
