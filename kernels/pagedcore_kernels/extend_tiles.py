"""Where the keys and values of some positions lie, and how the extend kernels load them.

    N blocks   K kv heads   B positions per block   D head size   KEYS positions in a tile

    key_cache, value_cache   [N, K, B, D]    contiguous; or descriptors over [N * K * B, D]
    key_scale, value_scale   [N, K, B]       contiguous; of 8-bit codes that have them

Functions for kernels alone: a tile is one run where it lies within a block, and rows of several
blocks where it does not.
"""

import triton
import triton.language as tl


@triton.jit
def block_ids(table, base, end, B: tl.constexpr, KEYS: tl.constexpr):
    """Blocks of the positions base .. base + KEYS - 1: one number if they lie in one block."""
    if KEYS <= B:
        blocks = tl.load(table + base // B, base < end, 0)
    else:
        position = base + tl.arange(0, KEYS)
        blocks = tl.load(table + position // B, position < end, 0)
    return blocks


@triton.jit
def load_tile(
    key_cache,
    value_cache,
    blocks,
    base,
    lowest,
    end,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    D_PAD: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Keys and values [KEYS, D] of the positions from base on, of which lowest .. end - 1 exist."""
    key = tl.arange(0, KEYS)
    column = tl.arange(0, D_PAD)
    exists = (base + key >= lowest) & (base + key < end)
    if DESCRIPTORS:
        row = (blocks * NUM_KV_HEADS + kv_head) * B + base % B
        keys = key_cache.load([row, 0])  # what is masked gets no weight, whatever it is
        values = value_cache.load([row, 0])
        if MASKED:
            values = tl.where(exists[:, None], values, 0.0)  # but zero times NaN is NaN
    else:
        if KEYS <= B:
            start = (blocks.to(tl.int64) * NUM_KV_HEADS + kv_head) * B + base % B
            offsets = start * D + (key[:, None] * D + column[None, :])
        else:
            row = (blocks.to(tl.int64) * NUM_KV_HEADS + kv_head) * B + (base + key) % B
            offsets = row[:, None] * D + column[None, :]
        if MASKED:
            loaded = exists[:, None] & (column < D)[None, :]
            keys = tl.load(key_cache + offsets, loaded, 0.0)
            values = tl.load(value_cache + offsets, loaded, 0.0)
        elif D == D_PAD:
            keys = tl.load(key_cache + offsets)
            values = tl.load(value_cache + offsets)
        else:
            keys = tl.load(key_cache + offsets, (column < D)[None, :], 0.0)
            values = tl.load(value_cache + offsets, (column < D)[None, :], 0.0)
    return keys, values


@triton.jit
def load_scales(
    key_scale,
    value_scale,
    blocks,
    base,
    lowest,
    end,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    B: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Scales [KEYS] of the same positions, 0 for those that do not exist; or 1, without scales."""
    if HAS_SCALES:
        key = tl.arange(0, KEYS)
        if KEYS <= B:
            row = (blocks.to(tl.int64) * NUM_KV_HEADS + kv_head) * B + base % B + key
        else:
            row = (blocks.to(tl.int64) * NUM_KV_HEADS + kv_head) * B + (base + key) % B
        if MASKED:
            exists = (base + key >= lowest) & (base + key < end)
            keys = tl.load(key_scale + row, exists, 0.0)
            values = tl.load(value_scale + row, exists, 0.0)
        else:
            keys = tl.load(key_scale + row)
            values = tl.load(value_scale + row)
    else:
        keys = 1.0
        values = 1.0
    return keys, values
