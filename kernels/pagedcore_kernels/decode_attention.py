"""Attention of one new token per sequence over its cached keys and values: the decode step.

    S sequences   H query heads   K kv heads   G = H / K heads that share keys   D head size
    N blocks      B positions per block        M table entries per row          P programs

    query                    [S, (H + 2K) * D]  the first H * D columns; S may have any stride
    key_cache, value_cache   [N, K, B, D]       contiguous
    block_table              [R, M] int32       indexed by rows [S] int32
    context_len              [S] int32          0 is padding, whose output is zero
    out                      [S, H * D]         contiguous S and H * D, same dtype as query

The keys of one head in one block lie together: a tile of TILE positions is one run of TILE * D
elements, which loads in full lines whatever the block size, and which a two-dimensional copy
descriptor over [N * K * B, D] can name by one row number.

The grid is (P, K), fixed for a device: each program takes an equal share of all tiles of one kv
head (see `work_list`) and walks through the sequences it covers. All G query heads of a kv head are
rows of one matrix product, padded to at least 16. The softmax is online, in float32, with base 2. A
sequence within one share is written at once. Of a split sequence each program leaves its piece in
`partial`, and the one that arrives last merges them all, always in order of position: the result
does not depend on who was last.

It reads 2 * K * D * itemsize bytes for each visible position, once: positions beyond the context
are masked in the load, so a last tile costs what it holds. Queries, outputs and pieces are small
beside that. At 4 * H * D operations a position the tensor cores are far from busy.

`TorchOps.attention` is the specification.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore_kernels.work_list import WorkList, first_visible_tile

LOG2_E = 1.4426950408889634
MIN_ROWS = 16  # of a matrix product on tensor cores


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """How the decode kernel is launched."""

    num_warps: int = 4
    num_stages: int = 3
    """Tiles in flight or in use."""

    programs_per_sm: int = 2
    """Programs that are resident together; more would wait for a second wave."""

    min_share: int = 4
    """Tiles that a program takes at least. Small: more parallel. Large: fewer merges."""


@triton.jit
def _merge(
    pieces,
    stats,
    out,
    first,
    last,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Write the attention of one sequence and kv head, from its pieces in programs first..last."""
    group = tl.arange(0, G_PAD)
    column = tl.arange(0, D_PAD)
    inside = (group < G)[:, None] & (column < D)[None, :]
    peak = tl.full([G_PAD], -1e30, tl.float32)
    weight = tl.zeros([G_PAD], tl.float32)
    total = tl.zeros([G_PAD, D_PAD], tl.float32)
    for program in range(first, last + 1):
        begins = (program == first).to(tl.int32)
        row = ((program * 2 + begins) * NUM_KV_HEADS + kv_head) * G + group
        piece_peak = tl.load(stats + row * 2, group < G, -1e30, cache_modifier=".cg")
        piece_weight = tl.load(stats + row * 2 + 1, group < G, 0.0, cache_modifier=".cg")
        piece = tl.load(
            pieces + row[:, None] * D + column[None, :], inside, 0.0, cache_modifier=".cg"
        )
        new_peak = tl.maximum(peak, piece_peak)
        old_factor = tl.exp2(peak - new_peak)
        new_factor = tl.exp2(piece_peak - new_peak)
        total = total * old_factor[:, None] + piece * new_factor[:, None]
        weight = weight * old_factor + piece_weight * new_factor
        peak = new_peak
    weight = tl.where(group < G, weight, 1.0)
    tl.store(out + group[:, None] * D + column[None, :], total / weight[:, None], inside)


@triton.jit
def _decode_kernel(
    query,
    key_cache,
    value_cache,
    out,
    pieces,
    stats,
    header,
    tile_start,
    first_sequence,
    arrivals,
    rows,
    context_len,
    block_table,
    query_stride,
    block_table_stride,
    scale,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    TILE: tl.constexpr,
    G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    group = tl.arange(0, G_PAD)
    column = tl.arange(0, D_PAD)
    position_in_tile = tl.arange(0, TILE)
    inside = (group < G)[:, None] & (column < D)[None, :]
    in_head = (kv_head * G + group)[:, None] * D + column[None, :]
    in_tile = position_in_tile[:, None] * D + column[None, :]

    share = tl.load(header + 1)
    tile = program * share
    end = tl.minimum(tile + share, tl.load(header))
    sequence = tl.load(first_sequence + program)
    while tile < end:
        length = tl.load(context_len + sequence)
        start = tl.load(tile_start + sequence)
        stop = tl.load(tile_start + sequence + 1)
        table = block_table + tl.load(rows + sequence).to(tl.int64) * block_table_stride
        source = query + sequence.to(tl.int64) * query_stride
        queries = tl.load(source + in_head, inside, 0.0)
        first_tile = first_visible_tile(length, WINDOW, TILE)
        piece_stop = tl.minimum(stop, end)

        peak = tl.full([G_PAD], -1e30, tl.float32)
        weight = tl.zeros([G_PAD], tl.float32)
        total = tl.zeros([G_PAD, D_PAD], tl.float32)
        for index in range(first_tile + tile - start, first_tile + piece_stop - start):
            base = index * TILE
            block = tl.load(table + base // BLOCK_SIZE).to(tl.int64)
            offset = ((block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + base % BLOCK_SIZE) * D
            position = base + position_in_tile
            visible = position < length
            if WINDOW > 0:
                visible &= position >= length - WINDOW
            loaded = visible[:, None] & (column < D)[None, :]
            keys = tl.load(key_cache + offset + in_tile, loaded, 0.0)
            values = tl.load(value_cache + offset + in_tile, loaded, 0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            if HAS_SOFT_CAP:  # scale holds 2 / cap: tanh(x) = 2 * sigmoid(2x) - 1
                scores = (2 * tl.sigmoid(scores) - 1) * soft_cap
            scores = tl.where(visible[None, :], scores, -1e30)
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            factor = tl.exp2(peak - new_peak)
            probs = tl.exp2(scores - new_peak[:, None])
            weight = weight * factor + tl.sum(probs, 1)
            total = total * factor[:, None]
            total = tl.dot(probs.to(values.dtype), values, total, input_precision=PRECISION)
            peak = new_peak

        target = out + sequence.to(tl.int64) * (NUM_KV_HEADS * G * D)
        if (tile == start) & (piece_stop == stop):
            tl.store(target + in_head, total / weight[:, None], inside)
        else:
            begins = (tile == start).to(tl.int32)
            row = ((program * 2 + begins) * NUM_KV_HEADS + kv_head) * G + group
            tl.store(stats + row * 2, peak, group < G)
            tl.store(stats + row * 2 + 1, weight, group < G)
            tl.store(pieces + row[:, None] * D + column[None, :], total, inside)
            first = start // share
            last = (stop - 1) // share
            counter = arrivals + sequence * NUM_KV_HEADS + kv_head
            tl.debug_barrier()  # all warps have stored before one thread announces it
            if tl.atomic_add(counter, 1, sem="acq_rel") == last - first:
                tl.store(counter, 0)  # for the next layer
                _merge(
                    pieces,
                    stats,
                    target + kv_head * G * D,
                    first,
                    last,
                    kv_head,
                    NUM_KV_HEADS,
                    G,
                    D,
                    G_PAD,
                    D_PAD,
                )
        tile = piece_stop
        sequence += 1


def tile_size(block_size: int) -> int:
    """Positions that the kernel loads at once."""
    return min(block_size, 64)


def decode_attention(
    query: Tensor,
    num_heads: int,
    scale: float,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    rows: Tensor,
    context_len: Tensor,
    work: WorkList,
    out: Tensor,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
) -> None:
    """Write the attention of S single tokens into out [S, H * D]; `work` is of the same step."""
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    group = num_heads // num_kv_heads
    assert group * num_kv_heads == num_heads
    assert query.stride(1) == 1 and out.is_contiguous() and block_table.stride(1) == 1
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    assert rows.is_contiguous() and context_len.is_contiguous()
    pieces = torch.empty(
        work.programs * 2 * num_heads * (head_dim + 2), dtype=torch.float32, device=query.device
    )
    _decode_kernel[(work.programs, num_kv_heads)](
        query,
        key_cache,
        value_cache,
        out,
        pieces,
        pieces[work.programs * 2 * num_heads * head_dim :],
        work.header,
        work.tile_start,
        work.first_sequence,
        work.arrivals,
        rows,
        context_len,
        block_table,
        query.stride(0),
        block_table.stride(0),
        scale * LOG2_E if soft_cap is None else 2 * scale / soft_cap,
        0.0 if soft_cap is None else soft_cap * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        G=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        HAS_SOFT_CAP=soft_cap is not None,
        TILE=tile_size(block_size),
        G_PAD=max(MIN_ROWS, triton.next_power_of_2(group)),
        D_PAD=triton.next_power_of_2(head_dim),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=num_warps,
        num_stages=num_stages,
    )
