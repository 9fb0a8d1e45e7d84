"""Attention of one new token per sequence over its latent vectors (MLA): the decode step.

    S sequences   H query heads   N blocks   B positions per block   P programs
    D elements of a latent vector, of which the first V are mixed, and R others turn
    G heads that a program answers, in H / G groups

    query    [S, H, D]       contiguous
    cache    [N, 1, B, D]    contiguous; the query's dtype or float8_e4m3fn
    work     WorkList        which tiles there are, and where; see `work_list`
    out      [S, H, V]       contiguous, same dtype as query

This is `decode_attention` with one kv head that all query heads share, whose values are the first V
elements of its keys: a tile is loaded once, as keys and as values. The G heads of a group are rows
of one matrix product, padded to at least 16; the keys' two parts are two products. A query is read
when its sequence begins, not with every tile, because it is as large as a tile. Shares, pieces and
their merge are those of `decode_attention`, where a kv head is a group of heads here.

It reads D * itemsize bytes for each visible position and group, and computes
2 * H * (D + V) operations: with 16 heads that is 30 operations a byte in 16 bits, with 128 more
than a GPU has for each byte.

`TorchOps.latent_attention` is the specification.
"""

from functools import cache as remember

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore_kernels.decode_attention import (
    LOG2_E,
    MIN_ROWS,
    DecodeConfig,
    announce_piece,
)
from pagedcore_kernels.dependent import can_depend, wait_for_predecessors
from pagedcore_kernels.work_list import WorkList

MOST_HEADS = 32
"""Of one program: their sums fill the registers of 8 warps."""


def heads_together(num_heads: int, most: int = MOST_HEADS) -> int:
    """G: the most heads, of so many at most, that make equal groups."""
    return max(g for g in range(1, most + 1) if num_heads % g == 0)


@remember
def choose_latent_decode(
    size: int, dtype: torch.dtype, num_heads: int, block_size: int, shared_memory: int
) -> DecodeConfig:
    """What fits multiprocessors of `shared_memory` bytes, for vectors of `size` elements."""
    rows = max(MIN_ROWS, triton.next_power_of_2(heads_together(num_heads)))
    num_warps = 4 if rows <= 16 else 8
    for tile, num_stages in ((64, 3), (32, 3), (32, 2), (16, 2)):
        tile = min(tile, block_size)
        needed = ((num_stages - 1) * tile + rows) * size * dtype.itemsize + 16 * 1024
        for programs in (2, 1):
            if programs * needed <= shared_memory and tile * size * dtype.itemsize <= 1 << 16:
                return DecodeConfig(tile, num_warps, num_stages, programs_per_sm=programs)
    return DecodeConfig(min(16, block_size), num_warps, 1, programs_per_sm=1)


@triton.jit
def _latent_decode_kernel(
    query,
    cache,
    out,
    pieces,
    stats,
    header,
    tile_start,
    tiles,
    arrivals,
    scale,
    GROUPS: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    G_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    program = tl.program_id(0)
    group = tl.program_id(1)
    wait_for_predecessors(DEPENDENT)
    share = tl.load(header + 1)
    begin = program * share
    end = tl.minimum(begin + share, tl.load(header))
    if begin >= end:
        return
    D: tl.constexpr = V + R
    row = tl.arange(0, G_PAD)
    column = tl.arange(0, V_PAD)
    turned = tl.arange(0, R_PAD)
    position = tl.arange(0, TILE)
    is_head = row < G
    inside = is_head[:, None] & (column < V)[None, :]
    head = group * G + row
    in_query = head[:, None] * D + column[None, :]
    in_turned = head[:, None] * D + V + turned[None, :]
    is_turned = is_head[:, None] & (turned < R)[None, :]

    place = tl.load(tiles + begin * 2)
    span = tl.load(tiles + begin * 2 + 1)
    first = span >> 16
    last = tl.load(tiles + end * 2 - 1) >> 16
    is_open = tl.load(tile_start + first) < begin  # the first piece goes on from another share
    is_cut = tl.load(tile_start + last + 1) > end  # the last piece goes on in another share
    peak = tl.full([G_PAD], -1e30, tl.float32)
    weight = tl.zeros([G_PAD], tl.float32)
    total = tl.zeros([G_PAD, V_PAD], tl.float32)
    source = query + first.to(tl.int64) * (GROUPS * G * D)
    queries = tl.load(source + in_query, inside, 0.0)
    queries_turned = tl.load(source + in_turned, is_turned, 0.0)
    for tile in range(begin, end):
        sequence = span >> 16
        begins = (span >> 15) & 1 != 0
        ends = ((span >> 14) & 1 != 0) | (tile + 1 == end)
        if begins:
            source = query + sequence.to(tl.int64) * (GROUPS * G * D)
            queries = tl.load(source + in_query, inside, 0.0)
            queries_turned = tl.load(source + in_turned, is_turned, 0.0)
        block = place // (B // TILE)
        part = place % (B // TILE)
        vectors = cache + (block.to(tl.int64) * B + part * TILE + position)[:, None] * D
        visible = position < (span & 127)
        fixed = tl.load(vectors + column[None, :], visible[:, None] & (column < V)[None, :], 0.0)
        keys = tl.load(vectors + V + turned[None, :], visible[:, None] & (turned < R)[None, :], 0.0)
        place = tl.load(tiles + tile * 2 + 2, tile + 1 < end, 0)  # of the next tile
        span = tl.load(tiles + tile * 2 + 3, tile + 1 < end, 0)

        fixed, keys = fixed.to(queries.dtype), keys.to(queries.dtype)
        scores = tl.dot(queries, tl.trans(fixed), input_precision=PRECISION)
        scores = tl.dot(queries_turned, tl.trans(keys), scores, input_precision=PRECISION) * scale
        scores = tl.where(visible[None, :], scores, -1e30)
        peak = tl.where(begins, -1e30, peak)
        weight = tl.where(begins, 0.0, weight)
        total = tl.where(begins, 0.0, total)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        factor = tl.exp2(peak - new_peak)
        probs = tl.exp2(scores - new_peak[:, None])
        weight = weight * factor + tl.sum(probs, 1)
        total = total * factor[:, None]
        total = tl.dot(probs.to(fixed.dtype), fixed, total, input_precision=PRECISION)
        peak = new_peak

        if ends:
            continues = is_open & (sequence == first)
            if continues | (is_cut & (sequence == last)):
                slot = program * 2 + (continues == 0).to(tl.int32)
                piece = (slot * GROUPS + group) * G + row
                tl.store(stats + piece * 2, peak, is_head)
                tl.store(stats + piece * 2 + 1, weight, is_head)
                tl.store(pieces + piece[:, None] * V + column[None, :], total, inside)
            else:
                target = out + sequence.to(tl.int64) * (GROUPS * G * V)
                target += head[:, None] * V + column[None, :]
                tl.store(target, total / weight[:, None], inside)

    tl.debug_barrier()  # all warps have stored their part before one thread announces it
    if is_open | (is_cut & (first == last)):
        announce_piece(first, pieces, stats, stats, out, tile_start, arrivals, share, group,
                       GROUPS, G, V, G_PAD, V_PAD, False)  # fmt: skip
    if is_cut & (first != last):
        announce_piece(last, pieces, stats, stats, out, tile_start, arrivals, share, group,
                       GROUPS, G, V, G_PAD, V_PAD, False)  # fmt: skip


def latent_decode(
    query: Tensor, scale: float, cache: Tensor, work: WorkList, out: Tensor, config: DecodeConfig
) -> None:
    """Write the attention of S single tokens into out [S, H, V]; `work` is of the same step."""
    _, num_heads, size = query.shape
    num_values, block_size = out.shape[2], cache.shape[2]
    heads = heads_together(num_heads)
    groups = num_heads // heads
    assert query.is_contiguous() and out.is_contiguous() and cache.is_contiguous()
    pieces = torch.empty(
        work.programs * 2 * num_heads * (num_values + 2), dtype=torch.float32, device=query.device
    )
    _latent_decode_kernel[(work.programs, groups)](
        query,
        cache,
        out,
        pieces,
        pieces[work.programs * 2 * num_heads * num_values :],
        work.header,
        work.tile_start,
        work.tiles,
        work.arrivals,
        scale * LOG2_E,
        GROUPS=groups,
        G=heads,
        V=num_values,
        R=size - num_values,
        B=block_size,
        TILE=config.tile,
        G_PAD=max(MIN_ROWS, triton.next_power_of_2(heads)),
        V_PAD=max(MIN_ROWS, triton.next_power_of_2(num_values)),
        R_PAD=max(MIN_ROWS, triton.next_power_of_2(size - num_values)),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        DEPENDENT=can_depend(query.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=can_depend(query.device),
    )
