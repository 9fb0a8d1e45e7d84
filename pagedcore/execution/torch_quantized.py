"""8 bits in plain torch: right on any device, and slow, because weights are widened in every step.

T tokens   h hidden size   G groups of inputs that share a scale
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.execution.quantized import FLOAT8, GROUP_COLUMNS, LARGEST, Activations, Quantized

_PIECE = 2**24
"""Elements that are in memory as float32 at a time."""


class TorchQuantizedOps(ABC):
    """`QuantizedOps` for `TorchOps`. Activations keep their type, unless another rounded them."""

    @abstractmethod
    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""

    def wants_quantized(
        self, num_tokens: int, weight: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> bool:
        """See `QuantizedOps.wants_quantized`."""
        return False

    def quantize(self, x: Tensor) -> Quantized:
        """See `QuantizedOps.quantize`."""
        values = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
        scale = torch.empty((len(x), 1), dtype=torch.float32, device=x.device)
        rows = max(1, _PIECE // max(1, x.shape[1]))
        for first in range(0, len(x), rows):
            piece = x[first : first + rows].float()
            largest = piece.abs().amax(-1, keepdim=True)
            part = (largest / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
            scale[first : first + rows] = part
            values[first : first + rows] = (piece / part).clamp_(-LARGEST, LARGEST).to(FLOAT8)
        return Quantized(values, scale, x.dtype)

    def scaled_linear(
        self, x: Activations, weight: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """See `QuantizedOps.scaled_linear`."""
        if isinstance(x, Quantized):
            x = (x.values.float() * x.scale).to(x.dtype)
        return functional.linear(x, widen(weight, scale, x.dtype), bias)

    def add_rms_norm_quantized(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Quantized, Tensor]:
        """See `QuantizedOps.add_rms_norm_quantized`."""
        normed, total = self.add_rms_norm(x, residual, weight, eps)
        return self.quantize(normed), total

    def silu_mul_quantized(self, gate_up: Tensor) -> Quantized:
        """See `QuantizedOps.silu_mul_quantized`."""
        return self.quantize(self.silu_mul(gate_up))


def widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What a weight [out, in] of 8 bits and its scale [out, G] stand for, in `dtype`."""
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(GROUP_COLUMNS, 1)[:, : weight.shape[1]]
    return (weight.float() * scale).to(dtype)
