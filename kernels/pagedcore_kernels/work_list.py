"""List the tiles of a step's decoding sequences, to be cut into equal shares.

    S sequences   R rows   M table entries per row   K kv heads   B positions per block
    L tiles, at most                                              TILE positions per tile

    context_len    [S] int32
    rows           [S] int32
    block_table    [R, M] int32      one cache group's
    header         [2] int32         tiles in all, and tiles in one share
    tile_start     [S + 1] int32     tiles of the sequences before, so the last entry is the total
    tiles          [L, 2] int32      where each tile lies in the cache; its span
    arrivals       [S * K] int32     zero; counts the finished pieces of a split sequence

The tiles of all sequences, laid end to end, are cut into P shares of equal length, whatever the
lengths of the sequences: share p is the tiles p * share .. (p + 1) * share - 1. A sequence that
crosses a border is *split*, and its pieces are merged by the program that finishes last. Which
pieces there are follows from `tile_start` alone, so nothing else needs a list.

A tile is two numbers: its place, block * (B // TILE) + part, and its *span*: the sequence, whether
it is the sequence's first and its last, and the first and end of the positions in it that are seen,
in 15, 1, 1, 7 and 7 bits. So whoever walks through a share needs neither tables nor lengths, and
knows early where to load from next.

The list depends on the step, the group and the window but not on the layer, so one launch serves
all layers. A tile before the window is not listed; a sequence without context (padding) counts as
one tile in which nothing is seen, so that its output is written too. The grid is (S,); every
program sums the S lengths for itself, which reads 8 * S * S bytes from the L2 cache and spares a
second launch, and writes the tiles of its own sequence.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TILE = 127
"""Positions in a tile that a span can name."""

MAX_SEQUENCES = 1 << 15
"""Sequences that a span can name."""


@dataclass(frozen=True, slots=True)
class WorkList:
    """Shares of a step's tiles; the fields are described above."""

    header: Tensor
    tile_start: Tensor
    tiles: Tensor
    arrivals: Tensor
    programs: int
    """P, the width of the grid."""


@triton.jit
def _num_tiles(length, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """Tiles that the newest query sees a part of, and the first of them."""
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE
    return tl.maximum(tl.cdiv(length, TILE) - first, 1), first


@triton.jit(do_not_specialize=["num_sequences", "table_stride", "programs", "min_share"])
def _work_list_kernel(
    context_len,
    rows,
    block_table,
    header,
    tile_start,
    tiles,
    arrivals,
    num_sequences,
    table_stride,
    programs,
    min_share,
    NUM_KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = 0
    before = 0
    for base in range(0, num_sequences, BLOCK):
        exists = base + lane < num_sequences
        count, _ = _num_tiles(tl.load(context_len + base + lane, exists, 0), WINDOW, TILE)
        total += tl.sum(tl.where(exists, count, 0))
        before += tl.sum(tl.where(base + lane < sequence, count, 0))
    if sequence == 0:
        tl.store(header, total)
        tl.store(header + 1, tl.maximum(tl.cdiv(total, programs), min_share))
        tl.store(tile_start + num_sequences, total)
    tl.store(tile_start + sequence, before)

    length = tl.load(context_len + sequence)
    num_tiles, first = _num_tiles(length, WINDOW, TILE)
    table = block_table + tl.load(rows + sequence).to(tl.int64) * table_stride
    for base in range(0, num_tiles, BLOCK):
        exists = base + lane < num_tiles
        start = (first + base + lane) * TILE
        block = tl.load(table + start // B, exists & (start < length), 0)
        end = tl.minimum(length - start, TILE)
        begin = tl.maximum(length - WINDOW - start, 0) if WINDOW > 0 else 0
        is_first = (base + lane == 0).to(tl.int32)
        is_last = (base + lane == num_tiles - 1).to(tl.int32)
        target = tiles + (before + base + lane) * 2
        tl.store(target, block * (B // TILE) + start % B // TILE, exists)
        whose = (sequence << 16) + (is_first << 15) + (is_last << 14)
        tl.store(target + 1, whose + (begin << 7) + end, exists)
    for base in range(0, NUM_KV_HEADS, BLOCK):
        tl.store(arrivals + sequence * NUM_KV_HEADS + base + lane, 0, base + lane < NUM_KV_HEADS)


def build_work_list(
    context_len: Tensor,
    rows: Tensor,
    block_table: Tensor,
    *,
    num_kv_heads: int,
    block_size: int,
    tile: int,
    window: int | None,
    max_context_len: int,
    programs: int,
    min_share: int,
) -> WorkList:
    """Share out the tiles of S sequences, of at most max_context_len, among P `programs` per head.

    No share is smaller than `min_share` tiles, which keeps short contexts in one piece.
    """
    num_sequences, device = context_len.shape[0], context_len.device
    assert (
        tile <= MAX_TILE
        and block_size % tile == 0
        and num_sequences <= MAX_SEQUENCES
        and block_table.stride(1) == 1
    )
    assert context_len.is_contiguous() and rows.is_contiguous()
    most = triton.cdiv(max(max_context_len, 1), tile)
    if window is not None:
        most = min(most, triton.cdiv(window, tile) + 1)
    sizes = (2, num_sequences + 1, num_sequences * num_kv_heads)
    header, tile_start, arrivals = torch.empty(sum(sizes), dtype=torch.int32, device=device).split(
        sizes
    )
    tiles = torch.empty((num_sequences * most, 2), dtype=torch.int32, device=device)
    _work_list_kernel[(num_sequences,)](
        context_len,
        rows,
        block_table,
        header,
        tile_start,
        tiles,
        arrivals,
        num_sequences,
        block_table.stride(0),
        programs,
        min_share,
        NUM_KV_HEADS=num_kv_heads,
        WINDOW=window or 0,
        B=block_size,
        TILE=tile,
        BLOCK=256,
        num_warps=2,
    )
    return WorkList(header, tile_start, tiles, arrivals, programs)
