"""Floats as integers that sort alike, and the search for a border among them.

    S rows   V vocabulary   C = cdiv(V, CHUNK) chunks of a row

    peaks   [S, C]   int32: each chunk's largest logit, as a key

A key is the float's bits, with those of negative numbers reversed below the sign. Integers compare
without surprises: NaN is the largest of all, as in torch's argmax, and both zeros are equal. The
low bits of a 16-bit float's key say nothing, so that a search may leave out SHIFT of them.
"""

import triton
import triton.language as tl

CHUNK = 1024
"""Tokens that are summed together. Part of the result: another size rounds differently."""

LOG2_E = 1.4426950408889634


@triton.jit
def key_of(value):
    """The sortable key, int32, of a float32."""
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(value == 0, 0, key)
    return tl.where(value != value, 0x7FFFFFFF, key)


@triton.jit
def value_of(key):
    """The float32 of a key; that of NaN is some NaN."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def short_key(value, SHIFT: tl.constexpr):
    """The key without its low SHIFT bits, which say nothing about values of a shorter type."""
    return key_of(value) >> SHIFT


@triton.jit
def short_value(key, SHIFT: tl.constexpr):
    """The value of the shorter type that has this short key, as a float32."""
    full = key.to(tl.int32) << SHIFT
    return value_of(tl.where(full < 0, full | ((1 << SHIFT) - 1), full))


@triton.jit
def peak_keys(peaks, row, chunk, num_chunks):
    """The keys of a row's chunks; where there is no chunk, that of -inf."""
    key = tl.load(peaks + row * num_chunks + chunk, chunk < num_chunks, 0)
    return tl.where(chunk < num_chunks, key, -2139095041)


@triton.jit
def is_filtered(min_p, top_k, top_p, row, num_tokens):
    """Whether a row's min_p, top-k or top-p may remove anything."""
    rank = tl.load(top_k + row)
    limited = (rank > 0) & (rank < num_tokens)
    return limited | (tl.load(min_p + row) > 0) | (tl.load(top_p + row) < 1)


@triton.jit
def least_of_min_p(floor, peak, heat, SLACK: tl.constexpr):
    """The least logit that min_p keeps; -inf where it keeps all."""
    bound = peak + heat * tl.log(tl.where(floor > 0, floor * (1 - SLACK), 1.0))
    return tl.where(floor > 0, bound, -float("inf"))


@triton.jit
def tile_border(key, weight, target, low, high):
    """The largest border in [low, high) from which up the weights reach `target`; else low."""
    low = low.to(tl.int64)  # a difference of two keys may need 33 bits
    high = high.to(tl.int64)
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        reaches = tl.sum(tl.where(key >= middle, weight, 0.0)) >= target
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle)
    return low.to(tl.int32)


@triton.jit
def ties_needed(target, above, at_border):
    """How many tokens that weigh `at_border` top-p needs beside `above`: at least one."""
    needed = tl.ceil((target - above) / tl.where(at_border > 0, at_border, 1.0))
    needed = tl.minimum(tl.maximum(needed, 1.0), 1e9)
    return tl.where(at_border > 0, needed, 1e9).to(tl.int32)
