"""Draw from the rows of logits whose filters keep too many tokens for a list.

    S rows   V vocabulary   C chunks of a row

    logits        [S, V]   any float type; V contiguous, S may have any stride
    parameters    [S]      as in `sampling`
    peaks         [S, C]   int32: each chunk's largest logit, as a key
    out           [S]      int64; only rows that hold UNFINISHED are looked at

The grid is (S,): one program reads its row several times. The border that top-k or top-p draws is
found by its key, with four pivots in each pass over the row. Keys have 32 bits, 16 for bfloat16: at
most 14 passes, or 7, end at the exact border. Two more passes draw. Such rows are rare (a top-p
close to 1 of a flat distribution, a top-k of thousands), so that this is about the worst case.
"""

import triton
import triton.language as tl
from torch import Tensor

from pagedcore.execution.ops import SamplingTensors
from pagedcore.execution.torch_sampling import SLACK
from pagedcore_kernels.sampling_keys import (
    LOG2_E,
    least_of_min_p,
    peak_keys,
    short_key,
    short_value,
    ties_needed,
    value_of,
)

UNFINISHED = -1
_TILE = 4096


@triton.jit
def _weigh(value, least, peak, scale, BY_MASS: tl.constexpr):
    """What a token from `least` up counts for; others count for 0."""
    weight = tl.where(value >= least, 1.0, 0.0)
    if BY_MASS:
        weight *= tl.exp2((value - peak) * scale)
    return weight


@triton.jit
def _row_border(
    source,
    num_tokens,
    least,
    peak,
    scale,
    target,
    low,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """The largest short key from which up the row's tokens reach `target`, by mass or by number."""
    low = low.to(tl.int64)  # a difference of two keys may need 33 bits
    high = short_key(peak, SHIFT).to(tl.int64) + 1
    while high - low > 1:
        pivot1 = tl.maximum(low + (high - low) // 5, low + 1)
        pivot2 = tl.maximum(low + (high - low) * 2 // 5, low + 1)
        pivot3 = tl.maximum(low + (high - low) * 3 // 5, low + 1)
        pivot4 = tl.maximum(low + (high - low) * 4 // 5, low + 1)
        cut1 = short_value(pivot1, SHIFT)
        cut2 = short_value(pivot2, SHIFT)
        cut3 = short_value(pivot3, SHIFT)
        cut4 = short_value(pivot4, SHIFT)
        part1 = tl.zeros([TILE], tl.float32)
        part2 = tl.zeros([TILE], tl.float32)
        part3 = tl.zeros([TILE], tl.float32)
        part4 = tl.zeros([TILE], tl.float32)
        for first in range(0, num_tokens, TILE):
            token = first + tl.arange(0, TILE)
            value = tl.load(source + token, token < num_tokens, -float("inf")).to(tl.float32)
            weight = _weigh(value, least, peak, scale, BY_MASS)
            part1 += tl.where(value >= cut1, weight, 0.0)
            part2 += tl.where(value >= cut2, weight, 0.0)
            part3 += tl.where(value >= cut3, weight, 0.0)
            part4 += tl.where(value >= cut4, weight, 0.0)
        reaches1 = tl.sum(part1) >= target
        reaches2 = tl.sum(part2) >= target
        reaches3 = tl.sum(part3) >= target
        reaches4 = tl.sum(part4) >= target
        low = tl.where(reaches1, pivot1, low)
        low = tl.where(reaches2, pivot2, low)
        low = tl.where(reaches3, pivot3, low)
        low = tl.where(reaches4, pivot4, low)
        high = tl.where(reaches4, high, pivot4)
        high = tl.where(reaches3, high, pivot3)
        high = tl.where(reaches2, high, pivot2)
        high = tl.where(reaches1, high, pivot1)
    return low.to(tl.int32)


@triton.jit
def _split(source, num_tokens, least, border, peak, scale, TILE: tl.constexpr):
    """The mass above `border`, and the number of tokens that are equal to it, from `least` up."""
    above = tl.zeros([TILE], tl.float32)
    ties = tl.zeros([TILE], tl.int32)
    for first in range(0, num_tokens, TILE):
        token = first + tl.arange(0, TILE)
        value = tl.load(source + token, token < num_tokens, -float("inf")).to(tl.float32)
        above += tl.where(value > border, _weigh(value, least, peak, scale, True), 0.0)
        ties += ((value == border) & (value >= least) & (token < num_tokens)).to(tl.int32)
    return tl.sum(above), tl.sum(ties)


@triton.jit
def _search(source, num_tokens, least, border, allowed, peak, scale, target, TILE: tl.constexpr):
    """The first token whose running mass exceeds `target`; ties beyond `allowed` weigh nothing."""
    running = target * 0
    ties = 0
    drawn = -1
    last = 0
    first = 0
    while (first < num_tokens) & (drawn < 0):
        token = first + tl.arange(0, TILE)
        value = tl.load(source + token, token < num_tokens, -float("inf")).to(tl.float32)
        tie = ((value == border) & (token < num_tokens)).to(tl.int32)
        kept = (value > border) | ((tie > 0) & (ties + tl.cumsum(tie) <= allowed))
        weight = tl.where(kept, _weigh(value, least, peak, scale, True), 0.0).to(tl.float64)
        passed = (running + tl.cumsum(weight) > target) & (weight > 0)
        place = tl.min(tl.where(passed, token, 2147483647))
        drawn = tl.where(place < num_tokens, place, -1)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, token, 0)))
        running += tl.sum(weight)
        ties += tl.sum(tie)
        first += TILE
    return tl.where(drawn < 0, last, drawn)


@triton.jit
def _unlisted_kernel(
    logits,
    temperature,
    min_p,
    top_k,
    top_p,
    uniform,
    peaks,
    out,
    logits_stride,
    num_tokens,
    num_chunks,
    SLACK: tl.constexpr,
    LOG2_E: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
    UNFINISHED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(out + row) == UNFINISHED:
        source = logits + row * logits_stride
        peak = value_of(tl.max(peak_keys(peaks, row, tl.arange(0, PADDED), num_chunks)))
        heat = tl.load(temperature + row)
        scale = LOG2_E / heat
        rank = tl.load(top_k + row)
        top_share = tl.load(top_p + row)
        least = least_of_min_p(tl.load(min_p + row), peak, heat, SLACK)

        border = short_key(least, SHIFT)  # at most the least token's, so that all are above
        if (rank > 0) & (rank < num_tokens):
            number = rank.to(tl.float32)
            border = _row_border(
                source, num_tokens, least, peak, scale, number, border, TILE, SHIFT, False
            )
            least = tl.maximum(least, short_value(border, SHIFT))
        allowed = 1000000000
        if top_share < 1:
            mass, _ = _split(source, num_tokens, least, -float("inf"), peak, scale, TILE)
            target = top_share * (1 - SLACK) * mass
            border = _row_border(
                source, num_tokens, least, peak, scale, target, border, TILE, SHIFT, True
            )
            above, _ = _split(
                source, num_tokens, least, short_value(border, SHIFT), peak, scale, TILE
            )
            at_border = tl.exp2((short_value(border, SHIFT) - peak) * scale)
            allowed = ties_needed(target, above, at_border)
        cut = short_value(border, SHIFT)
        above, ties = _split(source, num_tokens, least, cut, peak, scale, TILE)
        shared = tl.minimum(ties, allowed).to(tl.float32) * tl.exp2((cut - peak) * scale)
        target = tl.load(uniform + row).to(tl.float64) * (above + shared).to(tl.float64)
        token = _search(source, num_tokens, least, cut, allowed, peak, scale, target, TILE)
        tl.store(out + row, token.to(tl.int64))


def draw_unlisted(
    logits: Tensor, sampling: SamplingTensors, peaks: Tensor, out: Tensor, shift: int
) -> None:
    """Write the tokens of rows that hold UNFINISHED in out [S]; `shift` is as in `short_key`."""
    num_rows, num_tokens = logits.shape
    num_chunks = peaks.shape[1]
    _unlisted_kernel[(num_rows,)](
        logits,
        sampling.temperature,
        sampling.min_p,
        sampling.top_k,
        sampling.top_p,
        sampling.uniform,
        peaks,
        out,
        logits.stride(0),
        num_tokens,
        num_chunks,
        SLACK=SLACK,
        LOG2_E=LOG2_E,
        PADDED=triton.next_power_of_2(num_chunks),
        TILE=_TILE,
        SHIFT=shift,
        UNFINISHED=UNFINISHED,
        num_warps=16,
    )
