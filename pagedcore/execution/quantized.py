"""Activations and weights of few bits: what they are, and the operations on them.

    T tokens   h hidden size   F MLP width   G groups of inputs that share a scale

A float8 (e4m3) tensor holds numbers up to 448 with 3 bits of fraction; each row of activations, and
each output of a weight, has a scale beside it that its numbers are multiplied by. Weights of 4 or 8
bits that are no floats are `Grouped`, whatever format they came in, and so are those of experts,
floats too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(slots=True)
class Grouped:
    """A weight [out, in] as codes of 4 or 8 bits, of which runs of in / G inputs share a scale.

    A code c of an output and a group stands for one of these, in float32, every operation rounded
    on its own: that is what each format's own definition comes to, to the bit.

        (c - zero) * scale            with `zero`; where nothing else is there, it is 2^(bits - 1)
        c * scale + minimum           with `minimum`
        table[c] * scale              with `table`
        float(c) * scale              with `float8`: the code is that of a FLOAT8
    """

    codes: Tensor
    """uint8, contiguous: [out, in] of 8 bits; [out, in / 2] of 4, even inputs in the low halves."""

    scale: Tensor
    """[out, G] in any float type."""

    bits: int
    """4 or 8."""

    zero: Tensor | None = None
    """[out, G] uint8."""

    minimum: Tensor | None = None
    """[out, G] float32."""

    table: Tensor | None = None
    """[16] float32, of 4 bits."""

    order: Tensor | None = None
    """[in] int64: column i multiplies input order[i]. None where they stand in order."""

    float8: bool = False
    """Of 8 bits, without anything but scales."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1] * (8 // self.bits)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scale.shape[1]


def join_grouped(parts: Sequence[Grouped]) -> Grouped | None:
    """The parts below each other as one weight; None where they are of different kinds."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if not all(_are_alike(first, part) for part in parts[1:]):
        return None

    def join(name: str) -> Tensor | None:
        tensors: list[Tensor] = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else _below(tensors)

    codes, scale = join("codes"), join("scale")
    assert codes is not None
    assert scale is not None
    return replace(first, codes=codes, scale=scale, zero=join("zero"), minimum=join("minimum"))


def rows_of(weight: Grouped, rows: slice) -> Grouped:
    """Some outputs of a weight, as a view."""
    zero, minimum = weight.zero, weight.minimum
    return replace(
        weight,
        codes=weight.codes[rows],
        scale=weight.scale[rows],
        zero=None if zero is None else zero[rows],
        minimum=None if minimum is None else minimum[rows],
    )


def _below(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].is_meta:  # where torch.cat would load torch's compiler
        rows = sum(len(tensor) for tensor in tensors)
        return tensors[0].new_empty((rows, *tensors[0].shape[1:]))
    return torch.cat(list(tensors))


def _are_alike(a: Grouped, b: Grouped) -> bool:
    """Whether two weights may share rows of codes, scales and what else there is."""
    kinds = [
        (w.bits, w.shape[1], w.scale.shape[1], w.scale.dtype, w.zero is None, w.minimum is None)
        for w in (a, b)
    ]
    return (
        kinds[0] == kinds[1]
        and a.float8 == b.float8
        and _equal(a.table, b.table)
        and _equal(a.order, b.order)
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.is_meta or torch.equal(a, b)


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

    def pack_grouped(self, weight: Grouped, dtype: torch.dtype) -> Grouped:
        """The weight in the layout that `grouped_linear` is fastest with; called once, at the load.

        `dtype` is that of the rows to come. The result stands for the same weight, and only
        `grouped_linear` of the same backend may read it; the original is given up.
        """
        ...

    def grouped_linear(self, x: Tensor, weight: Grouped, bias: Tensor | None = None) -> Tensor:
        """x [T, in] times a packed weight [out, in], plus bias [out]: [T, out] in x's dtype.

        x comes in its own order, also where the weight has one. Sums are in float32; the weight's
        numbers may be rounded to x's dtype once.
        """
        ...

    def pack_int8(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight [out, in] int8 in the layout that `int8_linear` is fastest with; called once.

        `dtype` is that of the rows to come. The result still has the shape [out, in], and only
        `int8_linear` of the same backend may read it.
        """
        ...

    def int8_linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """x [T, in] times a packed weight [out, in] int8, plus bias [out]: [T, out] in x's dtype.

        Each row of x is rounded to whole numbers up to 127 of its largest magnitude; products are
        summed exactly, and count `scale` [out, 1] float32 times.
        """
        ...
