"""Draw from the rows of logits that use min_p, top-k or top-p, out of a short list of tokens.

    S rows   V vocabulary   C = cdiv(V, CHUNK) chunks of a row   L = CAPACITY tokens in a list

    logits           [S, V]   any float type; V contiguous, S may have any stride
    parameters       [S]      as in `sampling`
    peaks, masses    [S, C]   of `sampling`: each chunk's largest logit, as a key, and its mass
    chosen           [S, C]   int32 scratch: chunks that may hold a token to keep
    values, tokens   [S, L]   float32 and int32 scratch: tokens that may be kept, by rising id
    out              [S]      int64; rows without a filter are left alone

The grid is (S,). A bound is guessed from the peaks alone: the k-th largest peak (k tokens are at
least as large), what min_p keeps, or what top-p keeps of a usual distribution. Chunks that reach
the bound are read once, and their tokens that reach it are listed. The list holds all that the
filters keep when it is not too long and, for top-p alone, heavy enough: then the border is
searched in registers. Other rows get UNFINISHED, and `unlisted_sampling` looks at them whole.

Of a mass m, top-p keeps the largest border for which the tokens from the border up hold at least
top_p * m; of tokens equal to the border, as many as that takes, with the lowest ids.

`pagedcore.execution.torch_sampling.sample` is the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore.execution.ops import SamplingTensors
from pagedcore.execution.torch_sampling import SLACK
from pagedcore_kernels.sampling_keys import (
    CHUNK,
    LOG2_E,
    is_filtered,
    least_of_min_p,
    peak_keys,
    short_key,
    short_value,
    ties_needed,
    tile_border,
    value_of,
)
from pagedcore_kernels.unlisted_sampling import UNFINISHED, draw_unlisted

CAPACITY = 4096
_GATHER = 4096
"""Tokens that are looked at together where chunks are picked."""

_USUAL = 1024
"""In a usual distribution, tokens with 1 / _USUAL of what top-p may leave out are all it keeps."""

_SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
_MAX_TOKENS = 2**24  # counts are exact in float32


@triton.jit
def _collect(
    source,
    key,
    bound,
    chosen,
    values,
    tokens,
    num_tokens,
    num_chunks,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    GATHER: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """List the tokens that reach the bound; returns how many, or some number above CAPACITY."""
    chunk = tl.arange(0, PADDED)
    picked = (value_of(key) >= bound) & (chunk < num_chunks)
    tl.store(chosen + tl.cumsum(picked.to(tl.int32)) - 1, chunk, picked)
    length = tl.sum(picked.to(tl.int32)) * CHUNK
    tl.debug_barrier()  # what one thread stored, others load
    first = 0
    count = 0
    while (first < length) & (count <= CAPACITY):
        index = first + tl.arange(0, GATHER)
        token = tl.load(chosen + index // CHUNK, index < length, 0) * CHUNK + index % CHUNK
        inside = (index < length) & (token < num_tokens)
        value = tl.load(source + token, inside, -float("inf")).to(tl.float32)
        taken = inside & (value >= bound)
        place = count + tl.cumsum(taken.to(tl.int32)) - 1
        tl.store(values + place, value, taken & (place < CAPACITY))
        tl.store(tokens + place, token, taken & (place < CAPACITY))
        count += tl.sum(taken.to(tl.int32))
        first += GATHER
    tl.debug_barrier()
    return count


@triton.jit
def _filtered_kernel(
    logits,
    temperature,
    min_p,
    top_k,
    top_p,
    uniform,
    peaks,
    masses,
    chosen,
    values,
    tokens,
    out,
    logits_stride,
    num_tokens,
    num_chunks,
    SLACK: tl.constexpr,
    LOG2_E: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    GATHER: tl.constexpr,
    CAPACITY: tl.constexpr,
    USUAL: tl.constexpr,
    SHIFT: tl.constexpr,
    UNFINISHED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, PADDED)
    inside = chunk < num_chunks
    peak_key = peak_keys(peaks, row, chunk, num_chunks)
    peak = value_of(tl.max(peak_key))
    heat = tl.load(temperature + row)
    usable = (heat != 0) & (tl.abs(peak) < float("inf"))
    if usable & is_filtered(min_p, top_k, top_p, row, num_tokens):
        values += row * CAPACITY
        tokens += row * CAPACITY
        scale = LOG2_E / heat
        rank = tl.load(top_k + row)
        rank = tl.where((rank > 0) & (rank < num_tokens), rank, 0)  # 0: no limit
        floor = tl.load(min_p + row)
        top_share = tl.load(top_p + row)
        share = top_share * (1 - SLACK)
        high = short_key(peak, SHIFT) + 1

        bound = least_of_min_p(floor, peak, heat, SLACK)
        if (rank > 0) & (rank <= num_chunks):
            short = peak_key >> SHIFT
            one = inside.to(tl.float32)
            kth = tile_border(short, one, rank.to(tl.float32), tl.min(short), high)
            bound = tl.maximum(bound, short_value(kth, SHIFT))
        guessed = (rank == 0) & (floor <= 0)
        mass = 0.0
        if guessed:
            part = tl.load(masses + row * num_chunks + chunk, inside, 0.0)
            mass = tl.sum(part * tl.exp2((value_of(peak_key) - peak) * scale))
            usual = peak + heat * tl.log((1 - top_share) / USUAL * mass)
            bound = tl.minimum(usual, peak)

        count = _collect(
            logits + row * logits_stride,
            peak_key,
            bound,
            chosen + row * num_chunks,
            values,
            tokens,
            num_tokens,
            num_chunks,
            CHUNK,
            PADDED,
            GATHER,
            CAPACITY,
        )
        index = tl.arange(0, CAPACITY)
        value = tl.load(values + index, index < count, -float("inf"))
        weight = tl.exp2((value - peak) * scale)
        is_whole = (count <= CAPACITY) & ((mass == 0) | (tl.sum(weight) >= share * mass))
        if is_whole:
            key = short_key(value, SHIFT)
            border = short_key(bound, SHIFT)
            if rank > 0:
                one = (index < count).to(tl.float32)
                border = tile_border(key, one, rank.to(tl.float32), border, high)
                weight = tl.where(key >= border, weight, 0.0)
            allowed = 1000000000
            if top_share < 1:
                target = share * tl.where(mass == 0, tl.sum(weight), mass)
                border = tile_border(key, weight, target, border, high)
                above = tl.sum(tl.where(key > border, weight, 0.0))
                at_border = tl.max(tl.where(key == border, weight, 0.0))
                allowed = ties_needed(target, above, at_border)
            tie = key == border
            kept = (key > border) | (tie & (tl.cumsum(tie.to(tl.int32)) <= allowed))
            exact = tl.where(kept, weight, 0.0).to(tl.float64)
            target = tl.load(uniform + row).to(tl.float64) * tl.sum(exact)
            # rounding may leave the target beyond the last sum; what weighs nothing is never drawn
            last = tl.max(tl.where(exact > 0, index, 0))
            passed = (tl.cumsum(exact) > target) & (exact > 0)
            place = tl.minimum(tl.min(tl.where(passed, index, CAPACITY)), last)
            tl.store(out + row, tl.load(tokens + place).to(tl.int64))
        else:
            tl.store(out + row, UNFINISHED)


def draw_filtered(
    logits: Tensor, sampling: SamplingTensors, peaks: Tensor, masses: Tensor, out: Tensor
) -> None:
    """Write the tokens of the rows that use a filter into out [S]; others keep what they have."""
    num_rows, num_tokens = logits.shape
    num_chunks = peaks.shape[1]
    assert logits.stride(1) == 1 and num_tokens <= _MAX_TOKENS
    chosen, tokens = (
        torch.empty((num_rows, length), dtype=torch.int32, device=logits.device)
        for length in (num_chunks, CAPACITY)
    )
    values = torch.empty((num_rows, CAPACITY), dtype=torch.float32, device=logits.device)
    shift = _SHIFTS[logits.dtype]
    _filtered_kernel[(num_rows,)](
        logits,
        sampling.temperature,
        sampling.min_p,
        sampling.top_k,
        sampling.top_p,
        sampling.uniform,
        peaks,
        masses,
        chosen,
        values,
        tokens,
        out,
        logits.stride(0),
        num_tokens,
        num_chunks,
        SLACK=SLACK,
        LOG2_E=LOG2_E,
        CHUNK=CHUNK,
        PADDED=triton.next_power_of_2(num_chunks),
        GATHER=_GATHER,
        CAPACITY=CAPACITY,
        USUAL=_USUAL,
        SHIFT=shift,
        UNFINISHED=UNFINISHED,
        num_warps=16,
    )
    draw_unlisted(logits, sampling, peaks, out, shift)
