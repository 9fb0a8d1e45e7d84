"""Activations and weights of 8 bits: what they are, and the operations on them.

    T tokens   h hidden size   F MLP width   G groups of inputs that share a scale

A float8 (e4m3) tensor holds numbers up to 448 with 3 bits of fraction; each row of activations, and
each output of a weight, has a scale beside it that its numbers are multiplied by.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of FLOAT8."""

GROUP_COLUMNS = 128
"""Inputs that share a scale, where a weight has more than one for each output."""


@dataclass(slots=True)
class Quantized:
    """Rows that were rounded to 8 bits: what they stand for is values * scale."""

    values: Tensor
    """[T, h] FLOAT8, contiguous."""

    scale: Tensor
    """[T, 1] float32."""

    dtype: torch.dtype
    """Of the activations that were rounded, and of what they are multiplied to."""


Activations = Tensor | Quantized
"""What a linear layer takes."""


class QuantizedOps(Protocol):
    """The part of a backend that works on 8 bits."""

    def wants_quantized(
        self, num_tokens: int, weight: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> bool:
        """Whether `scaled_linear` with this weight rounds so many rows of `dtype` to 8 bits.

        If so, it is faster to give it rows that another operation has rounded on its way.
        """
        ...

    def quantize(self, x: Tensor) -> Quantized:
        """Round each row of x [T, h] to 8 bits, its largest magnitude to LARGEST.

        A row with NaN or infinity holds NaN afterwards; a row of zeros stays zero.
        """
        ...

    def scaled_linear(
        self, x: Activations, weight: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """x [T, in] times weight [out, in] in FLOAT8, plus bias [out]: [T, out] in x's dtype.

        The weight's numbers count `scale` [out, G] float32 times: G is 1, or
        ceil(in / GROUP_COLUMNS), a scale for each group of inputs. Rows that are not Quantized may
        be multiplied as they are, or be rounded as `quantize` does.
        """
        ...

    def add_rms_norm_quantized(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Quantized, Tensor]:
        """As `Ops.add_rms_norm`; the norm comes rounded as by `quantize`."""
        ...

    def silu_mul_quantized(self, gate_up: Tensor) -> Quantized:
        """As `Ops.silu_mul`, rounded as by `quantize`."""
        ...
