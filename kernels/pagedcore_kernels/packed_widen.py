"""Write a packed weight in the type of the rows that it is multiplied with: for many rows.

    N outputs   K inputs   B blocks; see `packed_layout`

    out       [N, K]   contiguous; bfloat16, float16 or float32

The grid is (tiles of N, B). Arithmetic is float32, rounded once. A weight is widened in pieces, so
that no more than one of them is in memory, and the vendor's library finds most of it in the L2
cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pagedcore_kernels.packed_codes import unpack
from pagedcore_kernels.packed_kernel import scale_of, zero_of
from pagedcore_kernels.packed_layout import POWERS, ROWS, Packed

PIECE = 2**25
"""Weights that are widened at a time."""

ALIGNED_ROWS = 128
"""Pieces have a multiple of so many outputs: the library is slow with odd ones."""

WIDENED_ROWS = 64
"""Of a program."""

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    POWERS: tl.uint8,
}


@triton.jit
def _widen_kernel(
    words,
    scales,
    zeros,
    minima,
    out,
    first_output,
    padded_outputs,
    num_outputs,
    num_inputs,
    num_blocks,
    BN: tl.constexpr,
    Q: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    START: tl.constexpr,
    TABLE: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
):
    WIDTH: tl.constexpr = Q * BITS // 4
    block = tl.program_id(1)
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    output = first_output + place
    safe = tl.minimum(output, padded_outputs - 1)
    column = tl.arange(0, Q)
    run = (safe // 16).to(tl.int64) * num_blocks * (16 * WIDTH) + safe % 16 * WIDTH
    source = words + run[:, None] + column[None, :] + block * (16 * WIDTH)
    pairs = tl.load(source)
    more = tl.load(source + Q) if BITS == 8 else pairs
    target = out + place.to(tl.int64)[:, None] * num_inputs
    for quarter in tl.static_range(4):
        k = (block * 4 + quarter) * Q + column
        group = 0 if GROUP == 0 else (block * 4 + quarter) * Q // GROUP
        zero = pairs
        if HAS_ZEROS:
            zero = zero_of(zeros, safe, padded_outputs, group)[:, None]
        weights = unpack(pairs, more, zero, BITS, HAS_ZEROS, START, TABLE, tl.float32, "")
        scale = scale_of(scales, safe, padded_outputs, group, SCALE_TYPE)
        value = weights[quarter] * scale[:, None]
        if HAS_MINIMA:
            value += tl.load(minima + group * padded_outputs + safe)[:, None]
        inside = (output < num_outputs)[:, None] & (k < num_inputs)[None, :]
        tl.store(target + k[None, :], value.to(out.dtype.element_ty), inside)


def format_of(weight: Packed) -> dict[str, Any]:
    """What a kernel is compiled for, of a weight."""
    return {
        "Q": weight.quarter,
        "BITS": weight.bits,
        "GROUP": weight.size,
        "HAS_ZEROS": weight.zero is not None,
        "HAS_MINIMA": weight.minimum is not None,
        "START": weight.start,
        "TABLE": weight.kind,
        "SCALE_TYPE": TYPES[weight.scale_dtype],
    }


def widen(weight: Packed, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Outputs first .. first + count of a packed weight, in `dtype`: [count, K]."""
    out = torch.empty((count, weight.num_inputs), dtype=dtype, device=weight.codes.device)
    strips, num_blocks = weight.codes.shape[:2]
    _widen_kernel[(triton.cdiv(count, WIDENED_ROWS), num_blocks)](
        weight.codes,
        weight.scale,
        weight.zero,
        weight.minimum,
        out,
        first,
        strips * ROWS,
        min(first + count, weight.num_outputs),
        weight.num_inputs,
        num_blocks,
        BN=WIDENED_ROWS,
        num_warps=4,
        **format_of(weight),
    )
    return out


def multiply_widened(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """As `linear`, by way of the weight in x's dtype, of which a piece is in memory at a time."""
    n, k = weight.shape
    rows = max(1, PIECE // k // ALIGNED_ROWS) * ALIGNED_ROWS
    if n <= rows:
        return functional.linear(x, widen(weight, 0, n, x.dtype), bias)
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    for first in range(0, n, rows):
        count = min(rows, n - first)
        piece = widen(weight, first, count, x.dtype)
        torch.mm(x, piece.t(), out=out[:, first : first + count])
    return out if bias is None else out.add_(bias)
