"""Multiply rows and a weight of whole numbers up to 127: sums are exact.

    M rows   N outputs   K inputs   P parts of the inputs

    x         [M, K]   K contiguous, M may have any stride; any float type
    values    [M, K]   int8, contiguous
    scale     [M]      float32: of a row
    weight    [N, K]   int8, contiguous
    shares    [N, 1]   float32, contiguous: the weight's scales
    bias      [N]      contiguous, in the result's dtype; optional
    partial   [P, tiles of M and N, BN, BM]   int32 scratch, where P > 1
    arrivals  [tiles of M and N]              int32, zero before and after; where P > 1
    out       [M, N]   contiguous, same dtype as x

Each row is rounded so that its largest magnitude becomes 127; a product's sum is int32, and counts
scale * share times. `TorchOps.int8_linear` is the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore_kernels.block_fp8 import BlockPlan, choose_block_plan
from pagedcore_kernels.dependent import wait_for_predecessors
from pagedcore_kernels.fp8 import TINY
from pagedcore_kernels.parts import join_parts
from pagedcore_kernels.small_linear import Scratch

COLUMNS = 128
"""That are multiplied at a time."""


@triton.jit
def _quantize_int8_kernel(
    x, values, scale, x_stride, num_columns, TINY, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    wait_for_predecessors(DEPENDENT)
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    part = tl.maximum(tl.max(tl.abs(value)) / 127.0, TINY)
    tl.store(scale + row, part)
    # adding 1.5 * 2 ** 23 leaves whole numbers, rounded to the nearest even one as torch does
    rounded = tl.div_rn(value, part) + 12582912.0
    whole = rounded.to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(values + row * num_columns + column, whole, inside)


@triton.jit(do_not_specialize=["num_rows"])
def _int8_kernel(
    values,
    scale,
    weight,
    shares,
    bias,
    out,
    partial,
    arrivals,
    num_rows,
    num_outputs,
    num_inputs,
    span,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    part = tl.program_id(1)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    output = tl.program_id(2) * BN + tl.arange(0, BN)
    safe_row = tl.minimum(row, num_rows - 1)
    safe = tl.minimum(output, num_outputs - 1)
    column = tl.arange(0, BK)
    value_at = safe_row.to(tl.int64)[None, :] * num_inputs + column[:, None]
    weight_at = safe.to(tl.int64)[:, None] * num_inputs + column[None, :]
    total = tl.zeros([BN, BM], tl.int32)
    wait_for_predecessors(DEPENDENT)
    for step in tl.range(0, span, num_stages=STAGES):
        first = (part * span + step) * BK
        if EVEN:
            left = tl.load(weight + weight_at + first)
            right = tl.load(values + value_at + first)
        else:
            k = first + column
            left = tl.load(weight + weight_at + first, (k < num_inputs)[None, :], 0)
            right = tl.load(values + value_at + first, (k < num_inputs)[:, None], 0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)

    in_tile = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    inside = (output < num_outputs)[:, None] & (row < num_rows)[None, :]
    is_last = True
    if PARTS > 1:
        tiles = tl.num_programs(0) * tl.num_programs(2)
        is_last, total = join_parts(
            total,
            partial,
            arrivals,
            part,
            tile,
            tiles,
            in_tile,
            inside,
            BM * BN,
            PARTS,
        )
    if is_last:
        result = total.to(tl.float32) * tl.load(scale + safe_row)[None, :]
        result *= tl.load(shares + safe)[:, None]
        if HAS_BIAS:
            result += tl.load(bias + output, output < num_outputs, 0.0).to(tl.float32)[:, None]
        target = out + row.to(tl.int64)[None, :] * num_outputs + output[:, None]
        tl.store(target, result.to(out.dtype.element_ty), inside)


def quantize(x: Tensor, *, dependent: bool = False) -> tuple[Tensor, Tensor]:
    """Round each row of x [M, K] to 127 of its largest magnitude: values [M, K], scale [M]."""
    num_rows, num_columns = x.shape
    assert x.stride(1) == 1 or num_columns == 1
    values = torch.empty((num_rows, num_columns), dtype=torch.int8, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(num_columns)
    if num_rows:
        _quantize_int8_kernel[(num_rows,)](
            x,
            values,
            scale,
            x.stride(0),
            num_columns,
            TINY,
            BLOCK=block,
            DEPENDENT=dependent,
            num_warps=min(max(block // 512, 1), 16),
            launch_pdl=dependent,
        )
    return values, scale


def linear(
    x: Tensor,
    weight: Tensor,
    shares: Tensor,
    bias: Tensor | None = None,
    scratch: Scratch | None = None,
    *,
    plan: BlockPlan | None = None,
    dependent: bool = False,
) -> Tensor:
    """x [M, K] times a weight [N, K] int8 times its shares, plus bias [N]: [M, N] in x's dtype."""
    num_rows, num_inputs = x.shape
    num_outputs = len(weight)
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    values, scale = quantize(x, dependent=dependent)
    plan = plan or choose_block_plan(num_rows, num_outputs, num_inputs)
    tiles = triton.cdiv(num_rows, plan.bm), triton.cdiv(num_outputs, plan.bn)
    parts = 1 if scratch is None else plan.parts
    span = triton.cdiv(num_inputs, COLUMNS * parts)
    partial, arrivals = None, None
    if scratch is not None and parts > 1:
        assert tiles[0] * tiles[1] <= len(scratch.arrivals)
        arrivals = scratch.arrivals
        size = parts * tiles[0] * tiles[1] * plan.bm * plan.bn
        partial = torch.empty(size, dtype=torch.int32, device=x.device)
    _int8_kernel[(tiles[0], parts, tiles[1])](
        values,
        scale,
        weight,
        shares,
        bias,
        out,
        partial,
        arrivals,
        num_rows,
        num_outputs,
        num_inputs,
        span,
        BM=plan.bm,
        BN=plan.bn,
        BK=COLUMNS,
        PARTS=parts,
        STAGES=plan.num_stages,
        EVEN=span * parts * COLUMNS == num_inputs,
        HAS_BIAS=bias is not None,
        DEPENDENT=dependent,
        num_warps=plan.num_warps,
        launch_pdl=dependent,
    )
    return out
