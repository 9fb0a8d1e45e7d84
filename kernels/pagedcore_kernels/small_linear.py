"""Multiply a few rows with a weight that is read once: the linear layers of a decode step.

    M rows   N outputs   K inputs   G groups of K   P parts of K, each a program of its own

    x         [M, K]      K contiguous, M may have any stride; bfloat16, float16 or float32
    weight    [N, K]      contiguous, same dtype, or float8 e4m3
    scale     [N, G]      float32, any strides; of a float8 weight: times what its numbers are.
                          G is 1, or cdiv(K, 128) for groups of 128 columns
    bias      [N]         contiguous, same dtype as x; optional
    partial   [P, tiles of M and N, BM, BN]   float32 scratch, where P > 1
    arrivals  [tiles of M and N]              int32, zero before and after; where P > 1
    out       [M, N]      contiguous, same dtype as x

For few rows, the N * K weights are the traffic, and memory bandwidth the limit.

For one row, a program holds BN weight rows and multiplies them with x element by element: nothing
is shared, so all of its loads are under way at once. For more rows, x is padded to BM rows of a
matrix product. Sums over K are cut twice, because a chain of products over all of K would take
longer than reading the weights: SLICES of K belong to one warp each and are added in shared memory;
P parts belong to one program each, and the program that arrives last adds them, in their order. So
results are the same in every run; but the order depends on the plan, and so on M.

Products are exact, sums float32, and the result is rounded once. A float8 weight becomes x's type
in registers, which is exact; x keeps its own. `TorchOps.linear` and `TorchOps.scaled_linear` are
the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore_kernels.small_linear_plans import (
    GROUP_COLUMNS,
    MAX_DOT_ROWS,
    MIN_DOT_ROWS,
    DotPlan,
    Plan,
    RowPlan,
    choose_plan,
    choose_scaled_plan,
    default_plan,
)


class Scratch:
    """Arrival counters of one device, for products that run one after the other."""

    def __init__(self, device: torch.device, max_tiles: int = 16384) -> None:
        self.arrivals = torch.zeros(max_tiles, dtype=torch.int32, device=device)


@triton.jit
def _widened(factor, dtype: tl.constexpr):
    """Weights in x's type. By way of float32: float8 has no instruction that ends in bfloat16."""
    if factor.dtype == dtype:
        return factor
    return factor.to(tl.float32).to(dtype)


@triton.jit
def _shares_of(
    source,
    inside,
    first,
    num_groups,
    stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Scales of BK columns from group `first` on, [BN, BK], of outputs [BN, 1] at `source`."""
    group = first + tl.arange(0, BK // GROUP)[None, :]
    share = tl.load(source + group * stride, inside[:, None] & (group < num_groups), 0.0)
    return tl.reshape(tl.broadcast_to(share[:, :, None], [BN, BK // GROUP, GROUP]), [BN, BK])


@triton.jit
def _row_kernel(
    x,
    weight,
    scale,
    bias,
    out,
    num_outputs,
    num_inputs,
    num_groups,
    scale_stride,
    group_stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    output = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = output < num_outputs
    shares = scale + output[:, None] * scale_stride if GROUP > 0 else scale
    row = tl.minimum(output, num_outputs - 1).to(tl.int64) * num_inputs
    column = tl.arange(0, BK)
    total = tl.zeros([BN, BK], tl.float32)
    if DEPENDENT:  # weights do not depend on anything: ask for the first before waiting
        tl.extra.cuda.gdc_launch_dependents()
        within = column < num_inputs
        early = tl.load(
            weight + row[:, None] + column[None, :],
            within[None, :],
            0.0,
            eviction_policy="evict_first",
        )
        share = 1.0
        if GROUP > 0:
            share = _shares_of(shares, inside, 0, num_groups, group_stride, BN, BK, GROUP)
        tl.extra.cuda.gdc_wait()
        value = tl.load(x + column, within, 0.0)
        total += early.to(tl.float32) * value.to(tl.float32)[None, :] * share
    start = BK if DEPENDENT else 0
    for first in range(start, num_inputs, BK * UNROLL):
        for step in tl.static_range(UNROLL):
            k = first + step * BK + column
            if EVEN:
                factor = tl.load(weight + row[:, None] + k[None, :], eviction_policy="evict_first")
                value = tl.load(x + k)
            else:
                within = k < num_inputs
                source = weight + row[:, None] + k[None, :]
                factor = tl.load(source, within[None, :], 0.0, eviction_policy="evict_first")
                value = tl.load(x + k, within, 0.0)
            product = factor.to(tl.float32) * value.to(tl.float32)[None, :]
            if GROUP > 0:
                group = (first + step * BK) // GROUP
                product *= _shares_of(
                    shares, inside, group, num_groups, group_stride, BN, BK, GROUP
                )
            total += product
    result = tl.sum(total, 1)
    if HAS_SCALE and GROUP == 0:
        result *= tl.load(scale + output * scale_stride, inside, 0.0)
    if HAS_BIAS:
        result += tl.load(bias + output, inside, 0.0).to(tl.float32)
    tl.store(out + output, result.to(out.dtype.element_ty), inside)


@triton.jit
def _dot_kernel(
    x,
    weight,
    scale,
    bias,
    out,
    partial,
    arrivals,
    num_rows,
    num_outputs,
    num_inputs,
    num_groups,
    scale_stride,
    group_stride,
    x_stride,
    span,
    parts,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    part = tl.program_id(1)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    output = tl.program_id(0) * BN + tl.arange(0, BN)
    safe_output = tl.minimum(output, num_outputs - 1).to(tl.int64)
    weight_row = safe_output * num_inputs
    x_row = row.to(tl.int64) * x_stride
    column = tl.arange(0, BK)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if SLICES > 1:
        start = (part * SLICES + tl.arange(0, SLICES)) * span
        total = tl.zeros([SLICES, BM, BN], tl.float32)
        for first in range(0, span, BK):
            k = start[:, None] + (first + column)[None, :]
            loaded = (row < num_rows)[None, :, None]
            source = weight + weight_row[None, :, None] + k[:, None, :]
            if EVEN:
                factor = tl.load(source)
            else:
                within = (k < num_inputs)[:, None, :]
                loaded &= within
                factor = tl.load(source, within, 0.0)
            value = tl.load(x + x_row[None, :, None] + k[:, None, :], loaded, 0.0)
            factor = tl.permute(_widened(factor, value.dtype), (0, 2, 1))
            if GROUP > 0:
                group = tl.minimum((start + first) // GROUP, num_groups - 1)[:, None]
                share = tl.load(scale + safe_output[None, :] * scale_stride + group * group_stride)
                total += tl.dot(value, factor, input_precision=PRECISION) * share[:, None, :]
            else:
                total = tl.dot(value, factor, total, input_precision=PRECISION)
        result = tl.sum(total, 0)
    else:
        result = tl.zeros([BM, BN], tl.float32)
        for first in range(0, span, BK):
            k = part * span + first + column
            loaded = (row < num_rows)[:, None]
            source = weight + weight_row[:, None] + k[None, :]
            if EVEN:
                factor = tl.load(source)
            else:
                within = (k < num_inputs)[None, :]
                loaded &= within
                factor = tl.load(source, within, 0.0)
            value = tl.load(x + x_row[:, None] + k[None, :], loaded, 0.0)
            factor = tl.trans(_widened(factor, value.dtype))
            if GROUP > 0:
                group = tl.minimum((part * span + first) // GROUP, num_groups - 1)
                share = tl.load(scale + safe_output * scale_stride + group * group_stride)
                result += tl.dot(value, factor, input_precision=PRECISION) * share[None, :]
            else:
                result = tl.dot(value, factor, result, input_precision=PRECISION)

    in_tile = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    inside = (row < num_rows)[:, None] & (output < num_outputs)[None, :]
    is_last = True
    if SPLIT:
        tiles = tl.num_programs(0) * tl.num_programs(2)
        tl.store(partial + (part * tiles + tile) * (BM * BN) + in_tile, result, inside)
        tl.debug_barrier()  # all warps have stored before one thread announces it
        is_last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == parts - 1
        if is_last:
            tl.store(arrivals + tile, 0)  # for the next product
            result = tl.zeros([BM, BN], tl.float32)
            for other in range(parts):
                piece = partial + (other * tiles + tile) * (BM * BN) + in_tile
                result += tl.load(piece, inside, 0.0, cache_modifier=".cg")
    if is_last:
        if HAS_SCALE and GROUP == 0:
            result *= tl.load(scale + safe_output * scale_stride)[None, :]
        if HAS_BIAS:
            result += tl.load(bias + output, output < num_outputs, 0.0).to(tl.float32)[None, :]
        target = out + row.to(tl.int64)[:, None] * num_outputs + output[None, :]
        tl.store(target, result.to(out.dtype.element_ty), inside)


def is_faster(m: int, n: int, k: int) -> bool:
    """Whether `linear` beats the vendor's library for m rows, on the GPUs that were measured."""
    return choose_plan(m, n, k) is not None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scratch: Scratch | None = None,
    *,
    scale: Tensor | None = None,
    plan: Plan | None = None,
    dependent: bool = False,
) -> Tensor:
    """x [M, K] times weight [N, K] times its scale [N, G], plus bias [N]: [M, N] in x's dtype.

    Without scratch, K is never cut between programs. A `dependent` kernel may start while the one
    before it ends, and waits for it before it reads anything.
    """
    num_rows, num_inputs = x.shape
    num_outputs = len(weight)
    assert weight.shape[1] == num_inputs and weight.is_contiguous()
    assert x.stride(1) == 1 and (scale is not None or x.dtype == weight.dtype)
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    num_groups = 1 if scale is None else scale.shape[1]
    if plan is None:
        choose = choose_plan if scale is None else choose_scaled_plan
        plan = choose(num_rows, num_outputs, num_inputs) or default_plan(num_rows)
    if isinstance(plan, RowPlan) and num_groups > 1 and plan.bk % GROUP_COLUMNS:
        plan = DotPlan()
    if isinstance(plan, RowPlan):
        _multiply_row(x, weight, scale, bias, out, plan, dependent)
    else:
        _multiply_rows(x, weight, scale, bias, out, plan, scratch, dependent)
    return out


def _multiply_row(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    plan: RowPlan,
    dependent: bool,
) -> None:
    num_outputs, num_inputs = weight.shape
    num_groups = 1 if scale is None else scale.shape[1]
    assert len(x) == 1
    _row_kernel[(triton.cdiv(num_outputs, plan.bn),)](
        x,
        weight,
        scale,
        bias,
        out,
        num_outputs,
        num_inputs,
        num_groups,
        *_strides(scale),
        BN=plan.bn,
        BK=plan.bk,
        UNROLL=plan.unroll,
        EVEN=(num_inputs - (plan.bk if dependent else 0)) % (plan.bk * plan.unroll) == 0,
        GROUP=GROUP_COLUMNS if num_groups > 1 else 0,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        DEPENDENT=dependent,
        num_warps=plan.num_warps,
        launch_pdl=dependent,
    )


def _multiply_rows(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    plan: DotPlan,
    scratch: Scratch | None,
    dependent: bool,
) -> None:
    num_rows, num_inputs = x.shape
    num_outputs = len(weight)
    num_groups = 1 if scale is None else scale.shape[1]
    bm = min(max(MIN_DOT_ROWS, triton.next_power_of_2(num_rows)), MAX_DOT_ROWS)
    grid = triton.cdiv(num_outputs, plan.bn), triton.cdiv(num_rows, bm)
    parts = 1 if scratch is None else plan.parts
    pieces = plan.slices * parts
    span = triton.cdiv(num_inputs, pieces * plan.bk) * plan.bk
    partial, arrivals = None, None
    if scratch is not None and parts > 1:
        tiles = grid[0] * grid[1]
        assert tiles <= len(scratch.arrivals)
        arrivals = scratch.arrivals
        partial = torch.empty(parts * tiles * bm * plan.bn, dtype=torch.float32, device=x.device)
    assert num_groups == 1 or (GROUP_COLUMNS % plan.bk == 0 and span % plan.bk == 0)
    _dot_kernel[(grid[0], parts, grid[1])](
        x,
        weight,
        scale,
        bias,
        out,
        partial,
        arrivals,
        num_rows,
        num_outputs,
        num_inputs,
        num_groups,
        *_strides(scale),
        x.stride(0),
        span,
        parts,
        BM=bm,
        BN=plan.bn,
        BK=plan.bk,
        SLICES=plan.slices,
        SPLIT=parts > 1,
        EVEN=span * pieces == num_inputs,
        GROUP=GROUP_COLUMNS if num_groups > 1 else 0,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        DEPENDENT=dependent,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        launch_pdl=dependent,
    )


def _strides(scale: Tensor | None) -> tuple[int, int]:
    return (0, 0) if scale is None else (scale.stride(0), scale.stride(1))
