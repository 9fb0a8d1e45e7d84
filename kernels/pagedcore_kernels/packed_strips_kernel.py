"""The kernel of `packed_strips`, in Gluon: what a thread holds is laid out by hand.

M rows   N outputs   K inputs   B blocks of 4 * Q inputs   P parts; see `packed_strips`

The grid is (runs of strips, P). A tile of words is loaded as the factor of a product on tensor
cores wants it, eight codes for each of four quarters in a register, and never moves between
threads. Sources: the instruction `mma.sync` and its fragments, PTX ISA 8; the order of inputs
within a quarter is free, as long as both factors have the same one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.constexpr_function
def _place(quarter, split, splits):
    """Where a tile of x is kept, of a split of a quarter; quarters count on over the blocks."""
    return (quarter // 4 * splits + split) * 4 + quarter % 4


@gluon.jit
def _load_each(source, COUNT: gl.constexpr, stride):
    """COUNT tiles that lie `stride` apart."""
    tiles = ()
    for index in gl.static_range(COUNT):
        tiles = tiles + (gl.load(source + index * stride),)
    return tiles


@gluon.jit
def _load_tiles(source, BLOCKS: gl.constexpr, SPLITS: gl.constexpr, Q: gl.constexpr):
    """The words of a strip in a slice: a tile for every 32 columns of each block."""
    tiles = ()
    for block in gl.static_range(BLOCKS):
        tiles = tiles + _load_each(source + block * (8 * Q), SPLITS, 16)
    return tiles


@gluon.jit
def _unpack(words, factor: gl.constexpr, DTYPE: gl.constexpr, ASSEMBLY: gl.constexpr):
    """Words [S, 16, 16] of eight codes: the four quarters' codes plus a constant, [S, 16, 32]."""
    low, high = (words & 0xFFFF).to(gl.int16), (words >> 16).to(gl.int16)
    pairs = gl.join(low, high).reshape([words.shape[0], 16, 32])
    bits = gl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,r", [pairs], (gl.int16,) * 4, True, 2)
    return (
        gl.convert_layout(bits[0].to(DTYPE, bitcast=True), factor, assert_trivial=True),
        gl.convert_layout(bits[1].to(DTYPE, bitcast=True), factor, assert_trivial=True),
        gl.convert_layout(bits[2].to(DTYPE, bitcast=True), factor, assert_trivial=True),
        gl.convert_layout(bits[3].to(DTYPE, bitcast=True), factor, assert_trivial=True),
    )


@gluon.jit
def _as_one_row(tile, layout: gl.constexpr):
    """A tile [S, 16, BM] whose rows are all the same: the registers of its rows 8.. are let go."""
    SLICES: gl.constexpr = tile.shape[0]
    BM: gl.constexpr = tile.shape[2]
    first, _ = tile.reshape([SLICES, 2, 8, BM]).permute([0, 2, 3, 1]).split()
    both = gl.join(first, first).permute([0, 3, 1, 2]).reshape([SLICES, 16, BM])
    return gl.convert_layout(both, layout, assert_trivial=True)


@gluon.jit
def _scale(words, index: gl.constexpr, group, GROUPS: gl.constexpr, TYPE: gl.constexpr):
    """Scales of a slice's group `index` in float32, from words of one or two of them."""
    PER_WORD: gl.constexpr = 1 if TYPE.is_fp32() else 2
    word = words[index // PER_WORD]
    if PER_WORD == 1:
        scale = word
    else:
        place = index % 2 if GROUPS > 1 else group % 2
        half = (word >> (place * 16)).to(gl.int16)
        scale = half.to(TYPE, bitcast=True).to(gl.float32)
    return scale


@gluon.jit
def _zero(words, index: gl.constexpr, group, GROUPS: gl.constexpr):
    """Zeros of a slice's group `index` in float32, from words of four of them."""
    place = index % 4 if GROUPS > 3 else (group + index) % 4
    return ((words[index // 4] >> (place * 8)) & 255).to(gl.float32)


@gluon.jit
def _join(
    partial,
    bias,
    out,
    num_rows,
    num_outputs,
    padded_outputs,
    first,
    end,
    BM: gl.constexpr,
    SLICES: gl.constexpr,
    PARTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Add the parts of outputs first .. end, in their order."""
    AT_ONCE: gl.constexpr = SLICES * 128 // BM  # outputs
    line: gl.constexpr = gl.BlockedLayout([4, 1], [BM // 4, 128 // BM], [1, SLICES], [0, 1])
    row = gl.arange(0, BM, gl.SliceLayout(1, line))[:, None]
    of_line = gl.arange(0, AT_ONCE, gl.SliceLayout(0, line))[None, :]
    while first < end:
        output = first + of_line
        inside = (row < num_rows) & (output < end)
        total = gl.zeros([BM, AT_ONCE], gl.float32, line)
        for part in gl.static_range(PARTS):
            piece = partial + (part * padded_outputs + output) * BM + row
            total += gl.load(piece, inside, 0.0, cache_modifier=".cg")
        if HAS_BIAS:
            total += gl.load(bias + output, output < end, 0.0).to(gl.float32)
        gl.store(out + row * num_outputs + output, total.to(out.dtype.element_ty), inside)
        first += AT_ONCE


@gluon.jit(do_not_specialize=["num_rows"])
def strips_kernel(
    x,
    words,
    scales,
    zeros,
    bias,
    out,
    partial,
    arrivals,
    num_rows,
    num_outputs,
    padded_outputs,
    num_blocks,
    x_stride,
    num_steps,
    BM: gl.constexpr,
    STRIPS: gl.constexpr,
    SLICES: gl.constexpr,
    BLOCKS: gl.constexpr,
    PARTS: gl.constexpr,
    Q: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    OFFSET: gl.constexpr,
    SCALE_TYPE: gl.constexpr,
    ASSEMBLY: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """A run of steps of STRIPS strips, or a part of their sums; see the head of `packed_strips`."""
    SPLITS: gl.constexpr = Q // 32  # tiles of a block
    SLICE: gl.constexpr = BLOCKS * 4 * Q  # inputs
    GROUPS: gl.constexpr = SLICE // GROUP
    QUARTERS: gl.constexpr = GROUP // Q  # of a group
    SCALE_WORDS: gl.constexpr = GROUPS if SCALE_TYPE.is_fp32() else (GROUPS + 1) // 2
    ZERO_WORDS: gl.constexpr = (GROUPS + 3) // 4 if HAS_ZEROS else 0
    DTYPE: gl.constexpr = x.dtype.element_ty
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SLICES, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 8)
    right: gl.constexpr = gl.DotOperandLayout(1, sums, 8)
    loaded: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [SLICES, 1, 1], [2, 1, 0])

    part = gl.program_id(1)
    step = gl.program_id(0) * num_steps
    last = gl.minimum(step + num_steps, padded_outputs // (16 * STRIPS))
    strip_words = num_blocks * (8 * Q)
    slice_of = gl.arange(0, SLICES, gl.SliceLayout(1, gl.SliceLayout(2, loaded)))
    row_of = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, loaded)))
    word_of = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, loaded)))
    source = words + step.to(gl.int64) * (STRIPS * strip_words) + part * SLICES * BLOCKS * (8 * Q)
    source += slice_of[:, None][:, :, None] * (BLOCKS * 8 * Q)
    source += row_of[None, :][:, :, None] * (Q // 2) + word_of[None, :][:, None, :]
    output = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, sums)))[None, :]
    output += step * (16 * STRIPS)
    slice_of = gl.arange(0, SLICES, gl.SliceLayout(1, gl.SliceLayout(2, sums)))[:, None]
    group = (part * SLICES + slice_of) * GROUPS
    if SCALE_TYPE.is_fp32():
        scale_source = scales + group * padded_outputs + output
    else:
        scale_source = scales + group // 2 * padded_outputs + output
    zero_source = scale_source
    if HAS_ZEROS:
        zero_source = zeros + group // 4 * padded_outputs + output

    now = ()
    for strip in gl.static_range(STRIPS):
        tiles = _load_tiles(source + strip * strip_words, BLOCKS, SPLITS, Q)
        scale_words = _load_each(scale_source + strip * 16, SCALE_WORDS, padded_outputs)
        zero_words = _load_each(zero_source + strip * 16, ZERO_WORDS, padded_outputs)
        now = now + ((tiles, scale_words, zero_words),)
    if DEPENDENT:
        gdc_wait()  # the weight depends on nothing: its first strips are under way by now

    slice_of = gl.arange(0, SLICES, gl.SliceLayout(1, gl.SliceLayout(2, right)))
    input_of = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, right)))[None, :][:, :, None]
    row = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, right)))[None, :][:, None, :]
    factor = x + row * x_stride + input_of
    factor += (part * SLICES + slice_of[:, None][:, :, None]) * SLICE
    is_row = (row < num_rows) & (input_of >= 0)
    factors = ()
    for index in gl.static_range(BLOCKS * SPLITS * 4):  # a block's tiles, and their quarters
        column = index // 4 // SPLITS * (4 * Q) + index // 4 % SPLITS * 32 + index % 4 * Q
        factors = factors + (gl.load(factor + column, is_row, 0.0),)
    ones = gl.full([SLICES, 16, 32], 1.0, DTYPE, left)
    row_sums = ()
    for index in gl.static_range(GROUPS):
        of_group = gl.zeros([SLICES, 16, BM], gl.float32, sums)
        for quarter in gl.static_range(index * QUARTERS, (index + 1) * QUARTERS):
            for split in gl.static_range(SPLITS):
                of_group = mma_v2(ones, factors[_place(quarter, split, SPLITS)], of_group)
        row_sums = row_sums + (_as_one_row(of_group * OFFSET, sums),)

    SHARED: gl.constexpr = 2 * SLICES // BM if BM < 2 * SLICES else 1  # threads of an output
    joined: gl.constexpr = gl.BlockedLayout(
        [SLICES // SHARED, 1, 1],
        [SHARED, 16 if SHARED <= 2 else 32 // SHARED, 2 if SHARED == 1 else 1],
        [1, SHARED // 2 if SHARED > 2 else 1, SLICES // (SHARED // 2 if SHARED > 2 else 1)],
        [0, 1, 2],
    )
    final: gl.constexpr = gl.SliceLayout(0, joined)
    output = gl.arange(0, 16, gl.SliceLayout(1, final))[:, None] + step * (16 * STRIPS)
    row = gl.arange(0, BM, gl.SliceLayout(0, final))[None, :]
    while step < last:
        more = gl.where(step + 1 < last, 1, 0)  # the last step asks for its own strips again
        source += more * (STRIPS * strip_words)
        scale_source += more * (16 * STRIPS)
        zero_source += more * (16 * STRIPS)
        totals = ()
        following = ()
        for strip in gl.static_range(STRIPS):
            words_now, scales_now, zeros_now = now[strip]
            total = gl.zeros([SLICES, 16, BM], gl.float32, sums)
            for index in gl.static_range(GROUPS):
                of_group = row_sums[index]
                if HAS_ZEROS:
                    zero = _zero(zeros_now, index, group, GROUPS)
                    of_group *= (1.0 - zero * (1.0 / OFFSET))[:, :, None]
                for split in gl.static_range(SPLITS):
                    words_of_tile = words_now[index * QUARTERS // 4 * SPLITS + split]
                    weights = _unpack(words_of_tile, left, DTYPE, ASSEMBLY)
                    for quarter in gl.static_range(index * QUARTERS, (index + 1) * QUARTERS):
                        of_quarter = factors[_place(quarter, split, SPLITS)]
                        of_group = mma_v2(weights[quarter % 4], of_quarter, of_group)
                scale = _scale(scales_now, index, group, GROUPS, SCALE_TYPE)
                total += of_group * scale[:, :, None]
            totals = totals + (total,)
            tiles = _load_tiles(source + strip * strip_words, BLOCKS, SPLITS, Q)
            scale_words = _load_each(scale_source + strip * 16, SCALE_WORDS, padded_outputs)
            zero_words = _load_each(zero_source + strip * 16, ZERO_WORDS, padded_outputs)
            following = following + ((tiles, scale_words, zero_words),)
        now = following
        for strip in gl.static_range(STRIPS):
            result = gl.sum(gl.convert_layout(totals[strip], joined), 0)
            at = output + strip * 16
            inside = (row < num_rows) & (at < num_outputs)
            if PARTS == 1:
                if HAS_BIAS:
                    result += gl.load(bias + at, at < num_outputs, 0.0).to(gl.float32)
                gl.store(out + row * num_outputs + at, result.to(DTYPE), inside)
            else:
                gl.store(partial + (part * padded_outputs + at) * BM + row, result, inside)
        output += 16 * STRIPS
        step += 1
    if DEPENDENT:
        gdc_launch_dependents()

    if PARTS > 1:
        gl.thread_barrier()  # all warps have stored before one thread announces it
        arrived = gl.atomic_add(arrivals + gl.program_id(0), 1, sem="acq_rel")
        if arrived == PARTS - 1:
            gl.store(arrivals + gl.program_id(0), 0)  # for the next product
            first = gl.program_id(0) * num_steps * (16 * STRIPS)
            end = gl.minimum(last * (16 * STRIPS), num_outputs)
            _join(
                partial, bias, out, num_rows, num_outputs, padded_outputs, first, end,
                BM, SLICES, PARTS, HAS_BIAS,
            )  # fmt: skip
