"""Assignments of tokens to experts, sorted into tiles; and what experts return, added up.

    T tokens   E experts   C experts chosen per token   A = T * C assignments   h hidden size

    chosen            [T, C]   int32, contiguous
    order             [A]      int32: assignments sorted by expert; number t * C + c each
    starts, counts    [E]      int32: each expert's first place in `order`, and how many it has
    part              [A, h]   contiguous
    out               [T, h]   contiguous

A tile is up to BM assignments of one expert. The number of tiles is known to the device only; a
grid has their upper bound A / BM + E, and a program beyond the last tile returns. Each program
finds its expert by a running sum over the E counts, so no list of tiles is ever written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Assignments:
    """Which tokens each expert has; see the head of this file."""

    order: Tensor
    starts: Tensor
    counts: Tensor

    def most_tiles(self, bm: int) -> int:
        """The upper bound of tiles of bm assignments."""
        num, num_experts = len(self.order), len(self.counts)
        return num // bm + min(num_experts, num)


def sort_assignments(chosen: Tensor, num_experts: int) -> Assignments:
    """Sort chosen [T, C] by expert, tokens of one in their order."""
    assert chosen.dtype == torch.int32 and chosen.is_contiguous()
    total, device = chosen.numel(), chosen.device
    order = torch.empty(total, dtype=torch.int32, device=device)
    starts = torch.empty(num_experts, dtype=torch.int32, device=device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    block = min(4096, max(128, triton.next_power_of_2(total)))
    _order[(num_experts,)](chosen, order, starts, counts, total, BLOCK=block, num_warps=4)
    return Assignments(order, starts, counts)


def combine(part: Tensor, out: Tensor, num_chosen: int) -> None:
    """out[t] = the sum of its part[t * C ...], in their order, in float32."""
    num_tokens, h = out.shape
    block = min(1024, triton.next_power_of_2(h))
    grid = num_tokens, triton.cdiv(h, block)
    _combine[grid](part, out, h, CHOSEN=num_chosen, BLOCK=block, num_warps=4)


@triton.jit
def _order(experts, order, starts, counts, num_assignments, BLOCK: tl.constexpr):
    mine = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    before = 0
    count = 0
    for base in range(0, num_assignments, BLOCK):
        e = tl.load(experts + base + i, base + i < num_assignments, 1 << 30)
        before += tl.sum((e < mine).to(tl.int32))
        count += tl.sum((e == mine).to(tl.int32))
    tl.store(starts + mine, before)
    tl.store(counts + mine, count)
    if count > 0:
        for base in range(0, num_assignments, BLOCK):
            e = tl.load(experts + base + i, base + i < num_assignments, 1 << 30)
            hit = (e == mine).to(tl.int32)
            rank = tl.cumsum(hit, 0) - 1
            tl.store(order + before + rank, base + i, hit == 1)
            before += tl.sum(hit)


@triton.jit
def find_tile(tile, starts, counts, num_experts, BM: tl.constexpr, BLOCK_E: tl.constexpr):
    """Expert of a tile, its first assignment in `order`, and how many it has; none beyond."""
    e = tl.arange(0, BLOCK_E)
    count = tl.load(counts + e, e < num_experts, 0)
    tiles = (count + BM - 1) // BM
    end = tl.cumsum(tiles, 0)
    expert = tl.sum((end <= tile).to(tl.int32))
    here = e == expert
    skipped = (tile - tl.sum(tl.where(here, end - tiles, 0))) * BM
    left = tl.sum(tl.where(here, count, 0)) - skipped
    first = tl.load(starts + expert, expert < num_experts, 0) + skipped
    return expert, first, tl.where(expert < num_experts, left, 0)


@triton.jit
def _combine(part, out, H, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(CHOSEN):
        total += tl.load(part + (t * CHOSEN + c) * H + n, n < H, 0.0).to(tl.float32)
    tl.store(out + t * H + n, total, n < H)
