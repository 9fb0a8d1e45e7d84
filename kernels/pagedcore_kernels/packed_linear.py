"""Multiply rows with a weight of 4 or 8 bits, which is unpacked in registers.

    M rows   N outputs   K inputs   B blocks of 128 inputs   P parts of the blocks

    x         [M, K]      K contiguous, M may have any stride; bfloat16, float16 or float32
    weight    [N, K]      as `packed_layout` lays it out
    bias      [N]         contiguous, same dtype as x; optional
    partial   [P, tiles of M and N, BN, BM]   float32 scratch, where P > 1
    arrivals  [tiles of M and N]              int32, zero before and after; where P > 1
    out       [M, N]      contiguous, same dtype as x

For few rows, the packed weight is the traffic. It is the left factor of a product on tensor cores,
so that eight rows of x are enough for a tile; codes become weights in the registers from which that
product reads (see `packed_codes`), and the scale of a group multiplies the group's sum. The sum
over K is cut as in `small_linear`: SLICES belong to warps, P parts to programs, of which the last
to arrive adds them in their order. So results are the same in every run.

Weights are exact in 16 bits but for their scale, products exact, sums float32; the result is
rounded once. For many rows `widen` writes the weight in x's dtype, piece by piece, and the vendor's
library multiplies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pagedcore_kernels.packed_codes import assembly, unpack
from pagedcore_kernels.packed_layout import ROWS, Packed
from pagedcore_kernels.packed_plans import PackedPlan, choose_plan, rows_per_program
from pagedcore_kernels.small_linear import Scratch

PIECE = 2**25
"""Weights that are widened at a time."""

WIDENED_ROWS = 64
"""Of a program."""

_SHORT = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _scale_of(scales, output, stride, group, TYPE: tl.constexpr):
    """Scales of outputs in a group, each [...], in float32."""
    if TYPE.is_fp32():
        scale = tl.load(scales + group * stride + output)
    else:
        pair = tl.load(scales + (group // 2) * stride + output)
        half = (pair >> (group % 2 * 16)).to(tl.int16)
        scale = half.to(TYPE, bitcast=True).to(tl.float32)
    return scale


@triton.jit
def _zero_of(zeros, output, stride, group):
    """Zeros of outputs in a group, each [...], as int16."""
    four = tl.load(zeros + (group // 4) * stride + output)
    return ((four >> (group % 4 * 8)) & 255).to(tl.int16)


@triton.jit
def _prefetch_blocks(
    words, strip, first, num_strips, num_blocks, WIDTH: tl.constexpr, COUNT: tl.constexpr
):
    """Ask for COUNT blocks from `first` on, or as many as there are, of strips of 16 outputs."""
    blocks = tl.minimum(COUNT, num_blocks - first)
    size = tl.where((strip < num_strips) & (blocks > 0), blocks * (32 * WIDTH), 0)
    source = words + (strip.to(tl.int64) * num_blocks + first) * (16 * WIDTH)
    tl.inline_asm_elementwise(
        """{
        .reg .pred some;
        setp.ne.u32 some, $2, 0;
        @some cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [source.to(tl.int64), size],
        tl.int32,
        False,
        1,
    )


@triton.jit
def _packed_kernel(
    x,
    words,
    scales,
    zeros,
    minima,
    row_sums,
    bias,
    out,
    partial,
    arrivals,
    num_rows,
    num_outputs,
    padded_outputs,
    num_inputs,
    num_blocks,
    num_groups,
    x_stride,
    span,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SLICES: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN: tl.constexpr,
    Q: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    START: tl.constexpr,
    TABLE: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    WIDTH: tl.constexpr = Q * BITS // 4  # words of a row in a block
    BLOCK: tl.constexpr = 4 * Q
    DTYPE: tl.constexpr = x.dtype.element_ty
    part = tl.program_id(1)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    output = tl.program_id(0) * BN + tl.arange(0, BN)
    safe = tl.minimum(output, padded_outputs - 1)
    run = (safe // 16).to(tl.int64) * num_blocks * (16 * WIDTH) + safe % 16 * WIDTH
    column = tl.arange(0, Q)
    x_row = row.to(tl.int64) * x_stride
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            _prefetch_blocks(
                words,
                tl.program_id(0) * (BN // 16) + tl.arange(0, BN // 16),
                part * span * SLICES,
                padded_outputs // 16,
                num_blocks,
                WIDTH,
                PREFETCH,
            )
        tl.extra.cuda.gdc_wait()
    if SLICES > 1:
        start = (part * SLICES + tl.arange(0, SLICES)[:, None]) * span
        word_at = run[None, :, None] + column[None, None, :]
        x_at = x_row[None, None, :] + column[None, :, None]
        is_row = (row < num_rows)[None, None, :]
        output_at = safe[None, :]
        sum_at = tl.minimum(row, num_rows - 1)[None, None, :] * num_groups
        total = tl.zeros([SLICES, BN, BM], tl.float32)
    else:
        start = part * span
        word_at = run[:, None] + column[None, :]
        x_at = x_row[None, :] + column[:, None]
        is_row = (row < num_rows)[None, :]
        output_at = safe
        sum_at = tl.minimum(row, num_rows - 1)[None, :] * num_groups
        total = tl.zeros([BN, BM], tl.float32)
    for step in tl.range(0, span, num_stages=STAGES):
        block = start + step
        known = block if EVEN else tl.minimum(block, num_blocks - 1)
        in_tile = tl.expand_dims(known, 2) if SLICES > 1 else known
        source = words + word_at + in_tile * (16 * WIDTH)
        pairs = tl.load(source)
        more = tl.load(source + Q) if BITS == 8 else pairs
        factor = x + x_at + in_tile * BLOCK
        if EVEN:
            x0 = tl.load(factor, is_row, 0.0)
            x1 = tl.load(factor + Q, is_row, 0.0)
            x2 = tl.load(factor + 2 * Q, is_row, 0.0)
            x3 = tl.load(factor + 3 * Q, is_row, 0.0)
        else:
            k = (tl.expand_dims(block, 2) if SLICES > 1 else block) * BLOCK
            k += column[None, :, None] if SLICES > 1 else column[:, None]
            x0 = tl.load(factor, is_row & (k < num_inputs), 0.0)
            x1 = tl.load(factor + Q, is_row & (k < num_inputs - Q), 0.0)
            x2 = tl.load(factor + 2 * Q, is_row & (k < num_inputs - 2 * Q), 0.0)
            x3 = tl.load(factor + 3 * Q, is_row & (k < num_inputs - 3 * Q), 0.0)
        factors = (x0, x1, x2, x3)
        COUNT: tl.constexpr = 1 if GROUP == 0 or GROUP >= BLOCK else BLOCK // GROUP
        for share in tl.static_range(COUNT):
            if GROUP == 0:
                group = known * 0
            elif GROUP >= BLOCK:
                group = known // (GROUP // BLOCK)
            else:
                group = known * COUNT + share
            zero = pairs
            if HAS_ZEROS:
                zero = tl.expand_dims(_zero_of(zeros, output_at, padded_outputs, group), -1)
            weights = unpack(pairs, more, zero, BITS, HAS_ZEROS, START, TABLE, DTYPE, ASSEMBLY)
            if GROUP == 0 and not HAS_MINIMA:
                for quarter in tl.static_range(4):
                    total = tl.dot(
                        weights[quarter], factors[quarter], total, input_precision=PRECISION
                    )
            else:
                sums = tl.zeros_like(total)
                for quarter in tl.static_range(share * 4 // COUNT, (share + 1) * 4 // COUNT):
                    sums = tl.dot(
                        weights[quarter], factors[quarter], sums, input_precision=PRECISION
                    )
                scale = _scale_of(scales, output_at, padded_outputs, group, SCALE_TYPE)
                total += sums * tl.expand_dims(scale, -1)
                if HAS_MINIMA:
                    minimum = tl.load(minima + group * padded_outputs + output_at)
                    of_all = block * COUNT + share
                    of_all = tl.expand_dims(of_all, 2) if SLICES > 1 else of_all
                    given = tl.load(row_sums + sum_at + of_all, of_all < num_groups, 0.0)
                    total += tl.expand_dims(minimum, -1) * given
    result = tl.sum(total, 0) if SLICES > 1 else total

    in_tile = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    inside = (output < num_outputs)[:, None] & (row < num_rows)[None, :]
    is_last = True
    if PARTS > 1:
        tiles = tl.num_programs(0) * tl.num_programs(2)
        tl.store(partial + (part * tiles + tile) * (BM * BN) + in_tile, result, inside)
        tl.debug_barrier()  # all warps have stored before one thread announces it
        is_last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == PARTS - 1
        if is_last:
            tl.store(arrivals + tile, 0)  # for the next product
            result = tl.zeros([BN, BM], tl.float32)
            for other in tl.static_range(PARTS):
                piece = partial + (other * tiles + tile) * (BM * BN) + in_tile
                result += tl.load(piece, inside, 0.0, cache_modifier=".cg")
    if is_last:
        if GROUP == 0 and not HAS_MINIMA:
            result *= tl.load(scales + safe)[:, None]
        if HAS_BIAS:
            result += tl.load(bias + output, output < num_outputs, 0.0).to(tl.float32)[:, None]
        target = out + row.to(tl.int64)[None, :] * num_outputs + output[:, None]
        tl.store(target, result.to(DTYPE), inside)


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
            zero = _zero_of(zeros, safe, padded_outputs, group)[:, None]
        weights = unpack(pairs, more, zero, BITS, HAS_ZEROS, START, TABLE, tl.float32, "")
        scale = _scale_of(scales, safe, padded_outputs, group, SCALE_TYPE)
        value = weights[quarter] * scale[:, None]
        if HAS_MINIMA:
            value += tl.load(minima + group * padded_outputs + safe)[:, None]
        inside = (output < num_outputs)[:, None] & (k < num_inputs)[None, :]
        tl.store(target + k[None, :], value.to(out.dtype.element_ty), inside)


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None = None,
    scratch: Scratch | None = None,
    *,
    plan: PackedPlan | None = None,
    dependent: bool = False,
) -> Tensor:
    """x [M, K] times a packed weight [N, K], plus bias [N]: [M, N] in x's dtype.

    The columns of x are in the weight's order. Without scratch, K is never cut between programs. A
    `dependent` kernel may start while the one before it ends, and waits for it before it reads
    anything but the weight.
    """
    num_rows = len(x)
    if plan is None:
        plan = choose_plan(num_rows, weight.num_outputs, weight.num_inputs)
    if plan is None:
        return multiply_widened(x, weight, bias)
    out = torch.empty((num_rows, weight.num_outputs), dtype=x.dtype, device=x.device)
    if num_rows:
        _multiply(x, weight, bias, out, plan, scratch, dependent)
    return out


def _multiply(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    out: Tensor,
    plan: PackedPlan,
    scratch: Scratch | None,
    dependent: bool,
) -> None:
    num_rows, num_inputs = x.shape
    strips, num_blocks = weight.codes.shape[:2]
    assert num_inputs == weight.num_inputs and x.stride(1) == 1
    bm = rows_per_program(num_rows)
    grid = triton.cdiv(weight.num_outputs, plan.bn), triton.cdiv(num_rows, bm)
    parts = 1 if scratch is None else plan.parts
    span = triton.cdiv(num_blocks, parts * plan.slices)
    partial, arrivals, row_sums = None, None, None
    if scratch is not None and parts > 1:
        tiles = grid[0] * grid[1]
        assert tiles <= len(scratch.arrivals)
        arrivals = scratch.arrivals
        partial = torch.empty(parts * tiles * bm * plan.bn, dtype=torch.float32, device=x.device)
    if weight.minimum is not None:
        row_sums = x.unflatten(1, (-1, weight.group)).sum(-1, dtype=torch.float32)
    _packed_kernel[(grid[0], parts, grid[1])](
        x,
        weight.codes,
        weight.scale,
        weight.zero,
        weight.minimum,
        row_sums,
        bias,
        out,
        partial,
        arrivals,
        num_rows,
        weight.num_outputs,
        strips * ROWS,
        num_inputs,
        num_blocks,
        num_inputs // weight.group,
        x.stride(0),
        span,
        BM=bm,
        BN=plan.bn,
        SLICES=plan.slices,
        PARTS=parts,
        STAGES=plan.num_stages,
        PREFETCH=plan.prefetch,
        EVEN=num_inputs % (4 * weight.quarter) == 0 and span * parts * plan.slices == num_blocks,
        ASSEMBLY=_assembly(x, weight),
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        DEPENDENT=dependent,
        num_warps=plan.num_warps,
        launch_pdl=dependent,
        **_format(weight),
    )


def _assembly(x: Tensor, weight: Packed) -> str:
    if triton.knobs.runtime.interpret:
        return ""
    start = None if weight.zero is not None else weight.start
    return assembly(weight.bits, _SHORT[x.dtype], start, weight.numbers)


def _format(weight: Packed) -> dict[str, object]:
    return {
        "Q": weight.quarter,
        "BITS": weight.bits,
        "GROUP": weight.size,
        "HAS_ZEROS": weight.zero is not None,
        "HAS_MINIMA": weight.minimum is not None,
        "START": weight.start,
        "TABLE": weight.numbers,
        "SCALE_TYPE": _TYPES[weight.scale_dtype],
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
        **_format(weight),
    )
    return out


def multiply_widened(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """As `linear`, by way of the weight in x's dtype, of which a piece is in memory at a time."""
    n, k = weight.shape
    rows = max(1, PIECE // k)
    if n <= rows:
        return functional.linear(x, widen(weight, 0, n, x.dtype), bias)
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    for first in range(0, n, rows):
        count = min(rows, n - first)
        piece = widen(weight, first, count, x.dtype)
        torch.mm(x, piece.t(), out=out[:, first : first + count])
    return out if bias is None else out.add_(bias)
