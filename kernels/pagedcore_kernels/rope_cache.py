"""Norm and rotate the queries and keys of a step in place, and write its keys and values away.

    T tokens   H query heads   K kv heads   D elements per head   R rotated elements, at most D
    N blocks   B positions per block

    qkv                       [T, (H + 2K) * D]   queries, keys, values; inner contiguous
    cos_sin                   [P, R]              float32; cosines of R / 2 angles, then their sines
    query_weight, key_weight  [D]                 of the norm over each head
    positions, slots          [T]                 int64; a slot is block * B + offset; 0 is padding
    key_cache, value_cache    [N, K, B, D]        contiguous; qkv's dtype, float8_e4m3fn or int8;
                                                  written
    key_scale, value_scale    [N, K, B] float32   contiguous; of int8 alone; written

The grid is (T, cdiv(H + 2K, HEADS)): one program moves HEADS heads of one token. The elements of a
head are loaded as *first* and *second* of the pairs that turn together, and the *rest* that passes.
It reads T * (H + 2K) * D elements and writes as many, and T * K * D more, since the keys go to two
places; arithmetic is float32 with one rounding at the end. Padded tokens all write slot 0, in
the null block, where nobody reads. A cache of float8 holds the values as they are, scaled by 1 and
limited to the largest that it can express, 448: beyond that the type knows only NaN. One of int8
holds whole numbers, and for each head a scale: its largest magnitude over 127, or NaN where a
number is not finite.

`TorchOps.rope_and_cache` is the specification, and `KVFormat.encode` that of what is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore.execution.ops import QKNorm, RopeTable
from pagedcore_kernels.dependent import can_depend, wait_for_predecessors

FP8_LIMIT = torch.finfo(torch.float8_e4m3fn).max


@triton.jit
def _normed(value, weight, column, inside, turns, is_query, inverse_rms, key_weight):
    """Scale value by the norm's factor and weight, where the head has a norm at all."""
    query = tl.load(weight + column, inside, 0.0).to(tl.float32)
    key = tl.load(key_weight + column, inside, 0.0).to(tl.float32)
    scaled = value * inverse_rms[:, None] * tl.where(is_query, query[None, :], key[None, :])
    return tl.where(turns, scaled, value)


@triton.jit
def _peak(x):
    """The largest magnitude of each row of x: infinity for NaN, which a maximum would pass over."""
    return tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)


@triton.jit
def _whole(x, scale):
    """x / scale, rounded to the nearest whole number, even ones first: as torch does."""
    # adding 1.5 * 2 ** 23 leaves the number in the lowest bits
    rounded = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)) + 12582912.0
    return rounded.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _rope_cache_kernel(
    qkv,
    cos_sin,
    query_weight,
    key_weight,
    positions,
    slots,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    qkv_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    is_query = head < NUM_HEADS
    turns = head < NUM_HEADS + NUM_KV_HEADS
    exists = head < NUM_HEADS + 2 * NUM_KV_HEADS
    source = qkv + token * qkv_stride + head * D

    half: tl.constexpr = ROTATED // 2
    pair = tl.arange(0, HALF_PAD)
    in_half = pair < half
    first_column = 2 * pair if INTERLEAVED else pair
    second_column = 2 * pair + 1 if INTERLEAVED else pair + half
    rest_column = ROTATED + tl.arange(0, REST_PAD)
    in_rest = rest_column < D
    half_mask = exists & in_half[None, :]
    rest_mask = exists & in_rest[None, :]
    wait_for_predecessors(DEPENDENT)
    first = tl.load(source + first_column[None, :], half_mask, 0.0).to(tl.float32)
    second = tl.load(source + second_column[None, :], half_mask, 0.0).to(tl.float32)
    rest = tl.load(source + rest_column[None, :], rest_mask, 0.0).to(tl.float32)

    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        inverse = tl.rsqrt(squares / D + eps)
        first = _normed(
            first, query_weight, first_column, in_half, turns, is_query, inverse, key_weight
        )
        second = _normed(
            second, query_weight, second_column, in_half, turns, is_query, inverse, key_weight
        )
        rest = _normed(
            rest, query_weight, rest_column, in_rest, turns, is_query, inverse, key_weight
        )
    if ROTATED:
        angles = cos_sin + tl.load(positions + token) * ROTATED + pair
        cos = tl.load(angles, in_half, 1.0)[None, :]
        sin = tl.load(angles + half, in_half, 0.0)[None, :]
        turned_first = first * cos - second * sin
        turned_second = second * cos + first * sin
        first = tl.where(turns, turned_first, first)
        second = tl.where(turns, turned_second, second)

    if HAS_NORM or ROTATED:
        tl.store(source + first_column[None, :], first, half_mask & turns)
        tl.store(source + second_column[None, :], second, half_mask & turns)
        if HAS_NORM:
            tl.store(source + rest_column[None, :], rest, rest_mask & turns)

    if LIMIT > 0:
        first = tl.clamp(first, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        second = tl.clamp(second, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        rest = tl.clamp(rest, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    slot = tl.load(slots + token)
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    place = slot // BLOCK_SIZE * NUM_KV_HEADS + kv_head
    place = place * BLOCK_SIZE + slot % BLOCK_SIZE
    target = tl.where(turns, key_cache, value_cache) + place * D
    is_stored = exists & (head >= NUM_HEADS)
    if HAS_SCALES:
        peak = tl.maximum(tl.maximum(_peak(first), _peak(second)), _peak(rest))
        scale = tl.where(peak < float("inf"), peak / 127.0, float("nan"))
        tl.store(tl.where(turns, key_scale, value_scale) + place, scale[:, None], is_stored)
        divisor = tl.where(scale > 0, scale, 1.0)
        first, second, rest = _whole(first, divisor), _whole(second, divisor), _whole(rest, divisor)
    tl.store(target + first_column[None, :], first, half_mask & is_stored)
    tl.store(target + second_column[None, :], second, half_mask & is_stored)
    tl.store(target + rest_column[None, :], rest, rest_mask & is_stored)


def rope_and_cache(
    qkv: Tensor,
    num_heads: int,
    rope: RopeTable | None,
    norm: QKNorm | None,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
    *,
    heads_per_program: int = 4,
    num_warps: int = 1,
) -> None:
    """Prepare qkv [T, (H + 2K) * D] for attention; the caches are [N, K, B, D], `scales` [N, K, B].

    `scales` are those of keys and of values.
    """
    tokens = qkv.shape[0]
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    num_all = num_heads + 2 * num_kv_heads
    assert qkv.shape[1] == num_all * head_dim and qkv.stride(1) == 1
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    assert scales is None or all(scale.is_contiguous() for scale in scales)
    assert positions.is_contiguous() and slots.is_contiguous()
    rotated = 0 if rope is None else rope.cos_sin.shape[1]
    assert rope is None or (rope.cos_sin.is_contiguous() and rotated % 2 == 0)
    if not tokens:
        return
    _rope_cache_kernel[(tokens, triton.cdiv(num_all, heads_per_program))](
        qkv,
        qkv if rope is None else rope.cos_sin,
        qkv if norm is None else norm.query_weight,
        qkv if norm is None else norm.key_weight,
        positions,
        slots,
        key_cache,
        value_cache,
        *((qkv, qkv) if scales is None else scales),
        qkv.stride(0),
        0.0 if norm is None else norm.eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        D=head_dim,
        ROTATED=rotated,
        INTERLEAVED=rope is not None and rope.interleaved,
        HAS_NORM=norm is not None,
        BLOCK_SIZE=block_size,
        HEADS=heads_per_program,
        HALF_PAD=triton.next_power_of_2(max(rotated // 2, 1)),
        REST_PAD=triton.next_power_of_2(max(head_dim - rotated, 1)),
        LIMIT=FP8_LIMIT if key_cache.dtype == torch.float8_e4m3fn else 0.0,
        HAS_SCALES=scales is not None,
        DEPENDENT=can_depend(qkv.device),
        num_warps=num_warps,
        launch_pdl=can_depend(qkv.device),
    )
