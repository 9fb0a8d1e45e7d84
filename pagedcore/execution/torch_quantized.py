"""Few bits in plain torch: right on any device, and slow, as weights are widened in every step.

T tokens   h hidden size   G groups of inputs that share a scale
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.execution.quantized import (
    FLOAT8,
    GROUP_COLUMNS,
    LARGEST,
    Activations,
    Grouped,
    Quantized,
)

_PIECE = 2**24
"""Elements that are in memory as float32 at a time."""

_ROWS = 16
"""More rows than these can be multiplied by CUDA in 8 bits, with sizes that are multiples of 8."""

_EXACT = 1024
"""Products of int8 whose sum a float32 holds exactly: 127 * 127 * 1024 < 2^24."""


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

    def pack_grouped(self, weight: Grouped, dtype: torch.dtype) -> Grouped:
        """See `QuantizedOps.pack_grouped`."""
        return weight

    def grouped_linear(self, x: Tensor, weight: Grouped, bias: Tensor | None = None) -> Tensor:
        """See `QuantizedOps.grouped_linear`."""
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        return functional.linear(x, widen_grouped(weight, x.dtype), bias)

    def pack_int8(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """See `QuantizedOps.pack_int8`."""
        return weight

    def int8_linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """See `QuantizedOps.int8_linear`."""
        wide = x.float()
        part = wide.abs().amax(-1, keepdim=True).div_(127).clamp_(min=torch.finfo().tiny)
        out = _sums((wide / part).round_(), weight).mul_(part).mul_(scale.t())
        return (out if bias is None else out.add_(bias)).to(x.dtype)


def _sums(values: Tensor, weight: Tensor) -> Tensor:
    """Whole numbers [T, in] float32 up to 127 times weight [out, in] int8: float32, exact sums."""
    out, columns = weight.shape
    if values.is_cpu or (len(values) > _ROWS and out % 8 == 0 and columns % 8 == 0):
        return torch._int_mm(values.to(torch.int8), weight.t()).float()
    sums = values.new_zeros((len(values), out))
    for first in range(0, columns, _EXACT):
        span = slice(first, first + _EXACT)
        sums += functional.linear(values[:, span], weight[:, span].float())
    return sums


def widen_grouped(weight: Grouped, dtype: torch.dtype) -> Tensor:
    """What a weight stands for, [out, in] in `dtype`; its columns as they are stored."""
    rows, columns = weight.shape
    wide = torch.empty((rows, columns), dtype=dtype, device=weight.codes.device)
    step = max(1, _PIECE // max(1, columns))
    for first in range(0, rows, step):
        wide[first : first + step] = _widen_rows(weight, slice(first, first + step))
    return wide


def _widen_rows(weight: Grouped, rows: slice) -> Tensor:
    """Some rows in float32; see `Grouped` for each of the operations."""
    codes, scale = weight.codes[rows], weight.scale[rows].float()[:, :, None]
    if weight.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    codes = codes.view(len(codes), scale.shape[1], -1)
    if weight.table is not None:
        return (weight.table[codes.int()] * scale).flatten(1)
    if weight.float8:
        return codes.view(FLOAT8).float().mul_(scale).flatten(1)
    values = codes.float()
    if weight.minimum is not None:
        return values.mul_(scale).add_(weight.minimum[rows, :, None]).flatten(1)
    if weight.zero is not None:
        values -= weight.zero[rows, :, None]
    else:
        values -= 2 ** (weight.bits - 1)
    return values.mul_(scale).flatten(1)


def widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What a weight [out, in] of 8 bits and its scale [out, G] stand for, in `dtype`."""
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(GROUP_COLUMNS, 1)[:, : weight.shape[1]]
    return (weight.float() * scale).to(dtype)
