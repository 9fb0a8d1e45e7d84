"""Prepare latent attention: norm and rotate latent vectors into the cache, rotate queries.

    T tokens   H query heads   N blocks   B positions per block
    D elements of a latent vector, of which the first V are normed and the last R turn

    query          [T, H, D]       contiguous; its last R columns are written
    unturned       [T, H, R]       R contiguous; T and H may have any stride
    latent         [T, D]          D contiguous; T may have any stride
    cos_sin        [P, R] float32  cosines of R / 2 angles, then their sines
    norm_weight    [V]
    positions      [T] int64
    slots          [T] int64       block * B + offset
    cache          [N, 1, B, D]    contiguous

The grid is (T, 1 + cdiv(H, HEADS)): the first program of a token writes its latent vector, each
other rotates HEADS heads. Arithmetic is float32 with one rounding at the end. It moves
2 * T * (D + H * R) elements.

`TorchOps.latent_to_cache` is the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore.execution.ops import RopeTable
from pagedcore_kernels.rope_cache import FP8_LIMIT


@triton.jit
def _turned(first, second, cos_sin, position, R: tl.constexpr, HALF_PAD: tl.constexpr):
    """Pairs [.., R / 2], turned by the angles of a position."""
    pair = tl.arange(0, HALF_PAD)
    cos = tl.load(cos_sin + position * R + pair, pair < R // 2, 1.0)[None, :]
    sin = tl.load(cos_sin + position * R + R // 2 + pair, pair < R // 2, 0.0)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _limited(x, LIMIT: tl.constexpr):
    return tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL) if LIMIT > 0 else x


@triton.jit
def _latent_cache_kernel(
    query,
    unturned,
    latent,
    cos_sin,
    norm_weight,
    positions,
    slots,
    cache,
    token_stride,
    head_stride,
    latent_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    V_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    LIMIT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_PAD)
    in_half = pair < R // 2
    first_column = 2 * pair if INTERLEAVED else pair
    second_column = 2 * pair + 1 if INTERLEAVED else pair + R // 2
    position = tl.load(positions + token)
    if tl.program_id(1) == 0:
        column = tl.arange(0, V_PAD)
        vector = latent + token * latent_stride
        slot = cache + tl.load(slots + token) * (V + R)
        x = tl.load(vector + column, column < V, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / V + eps)
        x = x * scale * tl.load(norm_weight + column, column < V, 0.0).to(tl.float32)
        tl.store(slot + column, _limited(x, LIMIT), column < V)
        a = tl.load(vector + V + first_column[None, :], in_half[None, :], 0.0).to(tl.float32)
        b = tl.load(vector + V + second_column[None, :], in_half[None, :], 0.0).to(tl.float32)
        turned_a, turned_b = _turned(a, b, cos_sin, position, R, HALF_PAD)
        tl.store(slot + V + first_column[None, :], _limited(turned_a, LIMIT), in_half[None, :])
        tl.store(slot + V + second_column[None, :], _limited(turned_b, LIMIT), in_half[None, :])
    else:
        head = ((tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS))[:, None]
        inside = (head < NUM_HEADS) & in_half[None, :]
        source = unturned + token * token_stride + head * head_stride
        target = query + (token * NUM_HEADS + head) * (V + R) + V
        first = tl.load(source + first_column[None, :], inside, 0.0).to(tl.float32)
        second = tl.load(source + second_column[None, :], inside, 0.0).to(tl.float32)
        turned_first, turned_second = _turned(first, second, cos_sin, position, R, HALF_PAD)
        tl.store(target + first_column[None, :], turned_first, inside)
        tl.store(target + second_column[None, :], turned_second, inside)


def latent_to_cache(
    query: Tensor,
    unturned: Tensor,
    latent: Tensor,
    rope: RopeTable,
    norm_weight: Tensor,
    eps: float,
    cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    heads_per_program: int = 16,
) -> None:
    """See the head of this file."""
    num_tokens, num_heads, size = query.shape
    turned, num_normed = rope.cos_sin.shape[1], len(norm_weight)
    assert num_normed + turned == size == cache.shape[3] == latent.shape[1]
    assert query.is_contiguous() and cache.is_contiguous() and rope.cos_sin.is_contiguous()
    assert unturned.stride(2) == 1 and latent.stride(1) == 1
    assert positions.is_contiguous() and slots.is_contiguous()
    if not num_tokens:
        return
    _latent_cache_kernel[(num_tokens, 1 + triton.cdiv(num_heads, heads_per_program))](
        query,
        unturned,
        latent,
        rope.cos_sin,
        norm_weight,
        positions,
        slots,
        cache,
        unturned.stride(0),
        unturned.stride(1),
        latent.stride(0),
        eps,
        NUM_HEADS=num_heads,
        V=num_normed,
        R=turned,
        INTERLEAVED=rope.interleaved,
        HEADS=heads_per_program,
        V_PAD=triton.next_power_of_2(num_normed),
        HALF_PAD=triton.next_power_of_2(turned // 2),
        LIMIT=FP8_LIMIT if cache.dtype == torch.float8_e4m3fn else 0.0,
        num_warps=2,
    )
