"""The kernel of `packed_experts`: one product of all experts, unpacked in registers.

    A assignments   N outputs and K inputs of an expert   B blocks; see `packed_experts`

The grid is tiles of assignments times tiles of N, these next to each other.
"""

import triton
import triton.language as tl

from pagedcore_kernels.expert_tiles import find_tile
from pagedcore_kernels.packed_codes import unpack
from pagedcore_kernels.packed_kernel import zero_of


@triton.jit
def _scale_in(word, group, TYPE: tl.constexpr):
    """The scale of a group in its word, in float32; see `packed_kernel.scale_of`."""
    if TYPE.is_fp32():
        scale = word
    elif TYPE.is_uint8():
        exponent = (word >> (group % 4 * 8)) & 255
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        scale = tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        half = (word >> (group % 2 * 16)).to(tl.int16)
        scale = half.to(TYPE, bitcast=True).to(tl.float32)
    return scale


@triton.jit
def packed_experts_kernel(
    x,
    words,
    scales,
    zeros,
    minima,
    bias,
    weights,
    order,
    starts,
    counts,
    out,
    num_experts,
    num_outputs,
    num_strips,
    num_inputs,
    num_blocks,
    alpha,
    limit,
    CHOSEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    Q: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    START: tl.constexpr,
    TABLE: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of outputs of one expert, for up to BM of its assignments."""
    WIDTH: tl.constexpr = Q * BITS // 4  # words of a row in a block
    BLOCK: tl.constexpr = 4 * Q
    COUNT: tl.constexpr = 1 if GROUP == 0 or GROUP >= BLOCK else BLOCK // GROUP
    PER: tl.constexpr = 4 // COUNT  # quarters of a group, or of a block
    IN_WORD: tl.constexpr = 32 // SCALE_TYPE.primitive_bitwidth
    DTYPE: tl.constexpr = x.dtype.element_ty
    num_n = tl.cdiv(num_outputs, BN)
    pid = tl.program_id(0)
    expert, first, left = find_tile(pid // num_n, starts, counts, num_experts, BM, BLOCK_E)
    if left > 0:
        m = tl.arange(0, BM)
        a = tl.load(order + first + m, m < left, 0).to(tl.int64)
        output = (pid % num_n) * BN + tl.arange(0, BN)
        safe = expert * (num_strips * 16) + tl.minimum(output, num_strips * 16 - 1)
        padded = num_experts * num_strips * 16
        column = tl.arange(0, Q)
        run = (safe // 16).to(tl.int64) * num_blocks * (16 * WIDTH) + safe % 16 * WIDTH
        source = words + run[:, None] + column[None, :]
        factor = x + (a // CHOSEN)[None, :] * num_inputs + column[:, None]
        is_row = (m < left)[None, :]
        total = tl.zeros([BN, BM], tl.float32)
        for block in tl.range(0, num_blocks, num_stages=STAGES):
            if GROUP == 0:
                group = 0
            elif GROUP >= BLOCK:
                group = block // (GROUP // BLOCK)
            else:
                group = block * COUNT
            pairs = tl.load(source + block * (16 * WIDTH))
            more = tl.load(source + block * (16 * WIDTH) + Q) if BITS == 8 else pairs
            if EVEN:
                x0 = tl.load(factor + block * BLOCK, is_row, 0.0)
                x1 = tl.load(factor + block * BLOCK + Q, is_row, 0.0)
                x2 = tl.load(factor + block * BLOCK + 2 * Q, is_row, 0.0)
                x3 = tl.load(factor + block * BLOCK + 3 * Q, is_row, 0.0)
            else:
                k = block * BLOCK + column[:, None]
                x0 = tl.load(factor + block * BLOCK, is_row & (k < num_inputs), 0.0)
                x1 = tl.load(factor + block * BLOCK + Q, is_row & (k < num_inputs - Q), 0.0)
                x2 = tl.load(factor + block * BLOCK + 2 * Q, is_row & (k < num_inputs - 2 * Q), 0.0)
                x3 = tl.load(factor + block * BLOCK + 3 * Q, is_row & (k < num_inputs - 3 * Q), 0.0)
            factors = (x0, x1, x2, x3)
            if GROUP > 0 or HAS_MINIMA:
                word = tl.load(scales + (group // IN_WORD) * padded + safe)
            for share in tl.static_range(COUNT):
                zero = pairs
                if HAS_ZEROS:
                    zero = zero_of(zeros, safe, padded, group + share)[:, None]
                codes = unpack(pairs, more, zero, BITS, HAS_ZEROS, START, TABLE, DTYPE, ASSEMBLY)
                if GROUP == 0 and not HAS_MINIMA:
                    for quarter in tl.static_range(4):
                        total = tl.dot(
                            codes[quarter], factors[quarter], total, input_precision=PRECISION
                        )
                else:
                    if share > 0 and share % IN_WORD == 0:
                        word = tl.load(scales + ((group + share) // IN_WORD) * padded + safe)
                    scale = _scale_in(word, group + share, SCALE_TYPE)
                    if SCALED:  # exact where scales are powers of two
                        by = scale[:, None].to(DTYPE)
                        for quarter in tl.static_range(share * PER, (share + 1) * PER):
                            total = tl.dot(
                                codes[quarter] * by,
                                factors[quarter],
                                total,
                                input_precision=PRECISION,
                            )
                    else:
                        sums = tl.zeros_like(total)
                        for quarter in tl.static_range(share * PER, (share + 1) * PER):
                            sums = tl.dot(
                                codes[quarter], factors[quarter], sums, input_precision=PRECISION
                            )
                        total += sums * scale[:, None]
                    if HAS_MINIMA:
                        minimum = tl.load(minima + (group + share) * padded + safe)
                        given = tl.zeros([BM], tl.float32)
                        for quarter in tl.static_range(share * PER, (share + 1) * PER):
                            given += tl.sum(factors[quarter].to(tl.float32), 0)
                        total += minimum[:, None] * given[None, :]
        if GROUP == 0 and not HAS_MINIMA:
            total *= tl.load(scales + safe)[:, None]
        if HAS_BIAS:
            own = bias + expert.to(tl.int64) * num_outputs + output
            total += tl.load(own, output < num_outputs, 0.0).to(tl.float32)[:, None]
        if GATED:  # rows of gates and of their partners take turns
            pair = tl.permute(tl.reshape(total, (BN // 2, 2, BM)), (0, 2, 1))
            gate, up = tl.split(pair)
            if HAS_CLAMP:
                gate = tl.minimum(gate, limit)
                up = tl.clamp(up, -limit, limit)
                result = gate / (1 + tl.exp(-alpha * gate)) * (up + 1)
            else:
                result = gate / (1 + tl.exp(-gate)) * up
            n = (pid % num_n) * (BN // 2) + tl.arange(0, BN // 2)
            width = num_outputs // 2
        else:
            result = total
            n = output
            width = num_outputs
        if HAS_WEIGHTS:
            result *= tl.load(weights + a, m < left, 0.0)[None, :]
        target = out + a[None, :] * width + n[:, None]
        tl.store(target, result.to(DTYPE), (n < width)[:, None] & is_row)
