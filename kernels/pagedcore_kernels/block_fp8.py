"""Multiply rows and a weight of 8 bits whose scales each belong to 128 inputs.

    M rows   N outputs   K inputs   G = cdiv(K, 128)   P parts of the groups

    values    [M, K]      float8 e4m3, contiguous
    scale     [G, M]      float32, M contiguous, G may have any stride: of 128 columns of a row
    weight    [N, K]      float8 e4m3, contiguous
    shares    [N, G]      float32, of any strides, best N contiguous: the weight's scales
    bias      [N]         contiguous, in the result's dtype; optional
    partial   [P, tiles of M and N, BN, BM]   float32 scratch, where P > 1
    arrivals  [tiles of M and N]              int32, zero before and after; where P > 1
    out       [M, N]      contiguous

The product of a group is one run of the tensor cores; it counts scale * share times, and is added
in float32. So sums are as exact as those of 16 bits, and nothing is kept in fewer bits for longer
than a group. The weight is the left factor, so that few rows make a narrow tile. Groups are cut in
P parts, and the program that arrives last adds them in their order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore.execution.quantized import FLOAT8, GROUP_COLUMNS, LARGEST
from pagedcore_kernels.dependent import wait_for_predecessors
from pagedcore_kernels.fp8 import TINY
from pagedcore_kernels.parts import join_parts
from pagedcore_kernels.small_linear import Scratch


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Each program takes bm rows, bn outputs, and 1 / parts of the groups."""

    bm: int = 16
    bn: int = 128
    parts: int = 1
    num_warps: int = 4
    num_stages: int = 4


def choose_block_plan(m: int, n: int, k: int) -> BlockPlan:
    """The plan for m rows with a weight [n, k]."""
    groups = -(-k // GROUP_COLUMNS)
    if m > 64:
        return BlockPlan(128, 128, 1, 8, 4)
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    tiles, parts = -(-n // 128), 1
    while parts < 8 and tiles * parts * 2 <= 400 and groups >= parts * 4:
        parts *= 2
    return BlockPlan(bm, 128, parts, 4, 5 if bm < 64 else 4)


@triton.jit
def _quantize_groups_kernel(
    x,
    values,
    scale,
    x_stride,
    scale_stride,
    num_columns,
    TINY,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < num_columns
    wait_for_predecessors(DEPENDENT)
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    part = tl.maximum(tl.max(tl.abs(value), 1) / LARGEST, TINY)
    rounded = value * tl.div_rn(1.0, part)[:, None]
    # NaN passes: it is neither below nor above
    rounded = tl.where(rounded > LARGEST, LARGEST, tl.where(rounded < -LARGEST, -LARGEST, rounded))
    tl.store(values + row * num_columns + column, rounded.to(values.dtype.element_ty), inside)
    tl.store(scale + group * scale_stride + row, part, group * GROUP < num_columns)


@triton.jit(do_not_specialize=["num_rows"])
def _block_kernel(
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
    num_groups,
    scale_stride,
    share_stride,
    group_stride,
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
    total = tl.zeros([BN, BM], tl.float32)
    wait_for_predecessors(DEPENDENT)
    for step in tl.range(0, span, num_stages=STAGES):
        group = part * span + step
        if EVEN:
            left = tl.load(weight + weight_at + group * BK)
            right = tl.load(values + value_at + group * BK)
        else:
            k = group * BK + column
            left = tl.load(weight + weight_at + group * BK, (k < num_inputs)[None, :], 0.0)
            right = tl.load(values + value_at + group * BK, (k < num_inputs)[:, None], 0.0)
        known = group if EVEN else tl.minimum(group, num_groups - 1)
        of_weight = tl.load(shares + safe * share_stride + known * group_stride)
        of_row = tl.load(scale + known * scale_stride + safe_row)
        total += tl.dot(left, right) * of_weight[:, None] * of_row[None, :]

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
        if HAS_BIAS:
            total += tl.load(bias + output, output < num_outputs, 0.0).to(tl.float32)[:, None]
        target = out + row.to(tl.int64)[None, :] * num_outputs + output[:, None]
        tl.store(target, total.to(out.dtype.element_ty), inside)


def quantize_groups(
    x: Tensor, *, multiple: int = 1, dependent: bool = False
) -> tuple[Tensor, Tensor]:
    """Round each 128 columns of x [M, K] to 8 bits: values [M, K], and their scale [G, M].

    Rows up to the next `multiple` are there, too, and hold anything.
    """
    num_rows, num_columns = x.shape
    num_groups = triton.cdiv(num_columns, GROUP_COLUMNS)
    room = triton.cdiv(num_rows, multiple) * multiple
    values = torch.empty((room, num_columns), dtype=FLOAT8, device=x.device)
    scale = torch.empty((num_groups, room), dtype=torch.float32, device=x.device)
    groups = min(8, triton.next_power_of_2(num_groups))
    if num_rows:
        _quantize_groups_kernel[(num_rows, triton.cdiv(num_groups, groups))](
            x,
            values,
            scale,
            x.stride(0),
            room,
            num_columns,
            TINY,
            LARGEST=LARGEST,
            GROUP=GROUP_COLUMNS,
            GROUPS=groups,
            DEPENDENT=dependent,
            num_warps=4,
            launch_pdl=dependent,
        )
    return values, scale


def block_linear(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    shares: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scratch: Scratch | None = None,
    *,
    plan: BlockPlan | None = None,
    dependent: bool = False,
) -> Tensor:
    """Rows of `quantize_groups` times a weight [N, K], plus bias [N]: [M, N] in dtype."""
    num_rows, num_inputs = values.shape
    num_outputs, num_groups = shares.shape
    out = torch.empty((num_rows, num_outputs), dtype=dtype, device=values.device)
    if not num_rows:
        return out
    plan = plan or choose_block_plan(num_rows, num_outputs, num_inputs)
    tiles = triton.cdiv(num_rows, plan.bm), triton.cdiv(num_outputs, plan.bn)
    parts = 1 if scratch is None else plan.parts
    span = triton.cdiv(num_groups, parts)
    partial, arrivals = None, None
    if scratch is not None and parts > 1:
        assert tiles[0] * tiles[1] <= len(scratch.arrivals)
        arrivals = scratch.arrivals
        size = parts * tiles[0] * tiles[1] * plan.bm * plan.bn
        partial = torch.empty(size, dtype=torch.float32, device=values.device)
    _block_kernel[(tiles[0], parts, tiles[1])](
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
        num_groups,
        scale.stride(0),
        shares.stride(0),
        shares.stride(1),
        span,
        BM=plan.bm,
        BN=plan.bn,
        BK=GROUP_COLUMNS,
        PARTS=parts,
        STAGES=plan.num_stages,
        EVEN=num_inputs % GROUP_COLUMNS == 0 and span * parts == num_groups,
        HAS_BIAS=bias is not None,
        DEPENDENT=dependent,
        num_warps=plan.num_warps,
        launch_pdl=dependent,
    )
    return out
