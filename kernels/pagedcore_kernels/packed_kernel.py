"""The kernel of `packed_linear`: a product whose left factor is unpacked in registers.

M rows   N outputs   K inputs   B blocks   P parts of the blocks; see `packed_linear`

The grid is (tiles of N, P, tiles of M).
"""

import triton
import triton.language as tl

from pagedcore_kernels.packed_codes import unpack
from pagedcore_kernels.parts import join_parts


@triton.jit
def scale_of(scales, output, stride, group, TYPE: tl.constexpr):
    """Scales of outputs in a group, each [...], in float32; uint8 stands for powers of two."""
    if TYPE.is_fp32():
        scale = tl.load(scales + group * stride + output)
    elif TYPE.is_uint8():
        four = tl.load(scales + (group // 4) * stride + output)
        exponent = (four >> (group % 4 * 8)) & 255
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        bits = tl.where(exponent == 255, 0x7FC00000, bits)
        scale = bits.to(tl.float32, bitcast=True)
    else:
        pair = tl.load(scales + (group // 2) * stride + output)
        half = (pair >> (group % 2 * 16)).to(tl.int16)
        scale = half.to(TYPE, bitcast=True).to(tl.float32)
    return scale


@triton.jit
def zero_of(zeros, output, stride, group):
    """Zeros of outputs in a group, each [...], as int16."""
    four = tl.load(zeros + (group // 4) * stride + output)
    return ((four >> (group % 4 * 8)) & 255).to(tl.int16)


@triton.jit
def _prefetch_blocks(words, strip, first, num_strips, num_blocks, WIDTH: tl.constexpr, count):
    """Ask for `count` blocks from `first` on, or as many as there are, of strips of 16 outputs."""
    blocks = tl.minimum(count, num_blocks - first)
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
def _touch(pointers):
    """Bring what pointers point to into the L2 cache."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l",
        [pointers.to(tl.int64)],
        tl.int32,
        False,
        1,
    )


@triton.jit(do_not_specialize=["num_rows"])
def packed_kernel(
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
    ONCE: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN: tl.constexpr,
    Q: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    """One tile of outputs and rows, or a part of its sum; see the head of `packed_linear`."""
    WIDTH: tl.constexpr = Q * BITS // 4  # words of a row in a block
    BLOCK: tl.constexpr = 4 * Q
    COUNT: tl.constexpr = 1 if GROUP == 0 or GROUP >= BLOCK else BLOCK // GROUP
    DTYPE: tl.constexpr = x.dtype.element_ty
    part = tl.program_id(1)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    output = tl.program_id(0) * BN + tl.arange(0, BN)
    safe = tl.minimum(output, padded_outputs - 1)
    run = (safe // 16).to(tl.int64) * num_blocks * (16 * WIDTH) + safe % 16 * WIDTH
    SPLITS: tl.constexpr = Q // COLUMNS  # steps that a block takes
    column = tl.arange(0, COLUMNS)
    x_row = row.to(tl.int64) * x_stride
    if DEPENDENT:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0 and not ONCE:
            run_of = tl.arange(0, BN // 16 * SLICES)
            _prefetch_blocks(
                words,
                tl.program_id(0) * (BN // 16) + run_of // SLICES,
                (part * SLICES + run_of % SLICES) * span,
                padded_outputs // 16,
                num_blocks,
                WIDTH,
                tl.minimum(span, PREFETCH),
            )
        if not ONCE:
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
    for step in tl.range(0, 1 if ONCE else span * SPLITS, num_stages=1 if ONCE else STAGES):
        block = start + step // SPLITS
        skipped = step % SPLITS * COLUMNS
        known = block if EVEN else tl.minimum(block, num_blocks - 1)
        in_tile = tl.expand_dims(known, 2) if SLICES > 1 else known
        source = words + word_at + in_tile * (16 * WIDTH) + skipped
        if GROUP == 0:
            group = known * 0
        elif GROUP >= BLOCK:
            group = known // (GROUP // BLOCK)
        else:
            group = known * COUNT
        if ONCE and DEPENDENT:  # scales come behind the words, and the way is not to be waited for
            PAIRED: tl.constexpr = (
                1 if SCALE_TYPE.is_fp32() else 32 // SCALE_TYPE.primitive_bitwidth
            )
            _touch(scales + (group // PAIRED) * padded_outputs + output_at)
        pairs = tl.load(source)
        more = tl.load(source + Q) if BITS == 8 else pairs
        scale = scale_of(scales, output_at, padded_outputs, group, SCALE_TYPE)
        if ONCE and DEPENDENT:  # weights do not depend on anything: all were asked for by now
            tl.extra.cuda.gdc_wait()
        factor = x + x_at + in_tile * BLOCK + skipped
        if EVEN:
            x0 = tl.load(factor, is_row, 0.0)
            x1 = tl.load(factor + Q, is_row, 0.0)
            x2 = tl.load(factor + 2 * Q, is_row, 0.0)
            x3 = tl.load(factor + 3 * Q, is_row, 0.0)
        else:
            k = (tl.expand_dims(block, 2) if SLICES > 1 else block) * BLOCK
            k += skipped
            k += column[None, :, None] if SLICES > 1 else column[:, None]
            x0 = tl.load(factor, is_row & (k < num_inputs), 0.0)
            x1 = tl.load(factor + Q, is_row & (k < num_inputs - Q), 0.0)
            x2 = tl.load(factor + 2 * Q, is_row & (k < num_inputs - 2 * Q), 0.0)
            x3 = tl.load(factor + 3 * Q, is_row & (k < num_inputs - 3 * Q), 0.0)
        factors = (x0, x1, x2, x3)
        for share in tl.static_range(COUNT):
            zero = pairs
            if HAS_ZEROS:
                of_group = zero_of(zeros, output_at, padded_outputs, group + share)
                zero = tl.expand_dims(of_group, -1)
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
                if share > 0:
                    scale = scale_of(scales, output_at, padded_outputs, group + share, SCALE_TYPE)
                total += sums * tl.expand_dims(scale, -1)
                if HAS_MINIMA:
                    minimum = tl.load(minima + (group + share) * padded_outputs + output_at)
                    of_all = block * COUNT + share
                    of_all = tl.expand_dims(of_all, 2) if SLICES > 1 else of_all
                    is_new = (of_all < num_groups) & (skipped == 0)
                    given = tl.load(row_sums + sum_at + of_all, is_new, 0.0)
                    total += tl.expand_dims(minimum, -1) * given
    if DEPENDENT and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    result = tl.sum(total, 0) if SLICES > 1 else total

    in_tile = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    inside = (output < num_outputs)[:, None] & (row < num_rows)[None, :]
    is_last = True
    if PARTS > 1:
        tiles = tl.num_programs(0) * tl.num_programs(2)
        is_last, result = join_parts(
            result,
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
        if GROUP == 0 and not HAS_MINIMA:
            result *= tl.load(scales + safe)[:, None]
        if HAS_BIAS:
            result += tl.load(bias + output, output < num_outputs, 0.0).to(tl.float32)[:, None]
        target = out + row.to(tl.int64)[None, :] * num_outputs + output[:, None]
        tl.store(target, result.to(DTYPE), inside)
