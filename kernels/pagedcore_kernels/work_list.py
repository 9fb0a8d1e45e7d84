"""Cut the keys of a step's decoding sequences into equal shares, one for each program.

    S sequences   P programs per kv head   B positions per tile

    context_len    [S] int32
    header         [2] int32         tiles in all, and tiles in one share
    tile_start     [S + 1] int32     tiles of the sequences before, so the last entry is the total
    first_sequence [P] int32         sequence that holds a share's first tile
    arrivals       [S * K] int32     zero; counts the finished pieces of a split sequence

The tiles of all sequences, laid end to end, are cut into shares of equal length, whatever the
lengths of the sequences: share p is the tiles p * share .. (p + 1) * share - 1. A sequence that
crosses a border is *split*, and its pieces are merged by the program that finishes last. Which
pieces there are follows from `tile_start` alone, so nothing else needs a list.

The list depends on the step and the window but not on the layer, so one launch serves all layers.
A tile before the window is not counted; a sequence without context (padding) counts as one tile,
so that its output is written too. The grid is (P,); every program sums the S lengths for itself,
which reads 4 * S * P bytes from the L2 cache and spares a second launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WorkList:
    """Shares of a step's tiles; the fields are described above."""

    header: Tensor
    tile_start: Tensor
    first_sequence: Tensor
    arrivals: Tensor
    programs: int
    """P, the width of the grid."""


@triton.jit
def first_visible_tile(context_len, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """The tile that holds the oldest position which the newest query sees."""
    if WINDOW > 0:
        return tl.maximum(context_len - WINDOW, 0) // TILE
    return context_len * 0


@triton.jit
def _num_tiles(context_len, WINDOW: tl.constexpr, TILE: tl.constexpr):
    tiles = tl.cdiv(context_len, TILE) - first_visible_tile(context_len, WINDOW, TILE)
    return tl.maximum(tiles, 1)


@triton.jit(do_not_specialize=["num_sequences", "num_arrivals", "min_share"])
def _work_list_kernel(
    context_len,
    header,
    tile_start,
    first_sequence,
    arrivals,
    num_sequences,
    num_arrivals,
    min_share,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    total = 0
    for base in range(0, num_sequences, BLOCK):
        exists = base + lane < num_sequences
        length = tl.load(context_len + base + lane, exists, 0)
        total += tl.sum(tl.where(exists, _num_tiles(length, WINDOW, TILE), 0))
    share = tl.maximum(tl.cdiv(total, programs), min_share)

    before = 0
    first = 0
    for base in range(0, num_sequences, BLOCK):
        exists = base + lane < num_sequences
        length = tl.load(context_len + base + lane, exists, 0)
        tiles = tl.where(exists, _num_tiles(length, WINDOW, TILE), 0)
        end = before + tl.cumsum(tiles)
        first += tl.sum((exists & (end <= program * share)).to(tl.int32))
        if program == 0:
            tl.store(tile_start + base + lane, end - tiles, exists)
        before += tl.sum(tiles)
    tl.store(first_sequence + program, first)
    if program == 0:
        tl.store(header, total)
        tl.store(header + 1, share)
        tl.store(tile_start + num_sequences, total)
    for base in range(program * BLOCK, num_arrivals, programs * BLOCK):
        tl.store(arrivals + base + lane, 0, base + lane < num_arrivals)


def build_work_list(
    context_len: Tensor,
    num_kv_heads: int,
    window: int | None,
    tile: int,
    programs: int,
    min_share: int,
) -> WorkList:
    """Share out the tiles of the sequences in context_len [S] among `programs` per kv head.

    No share is smaller than `min_share` tiles, which keeps short contexts in one piece.
    """
    num_sequences = context_len.shape[0]
    num_arrivals = num_sequences * num_kv_heads
    sizes = (2, num_sequences + 1, programs, num_arrivals)
    storage = torch.empty(sum(sizes), dtype=torch.int32, device=context_len.device)
    header, tile_start, first_sequence, arrivals = storage.split(sizes)
    _work_list_kernel[(programs,)](
        context_len,
        header,
        tile_start,
        first_sequence,
        arrivals,
        num_sequences,
        num_arrivals,
        min_share,
        WINDOW=window or 0,
        TILE=tile,
        BLOCK=1024,
        num_warps=4,
    )
    return WorkList(header, tile_start, first_sequence, arrivals, programs)
