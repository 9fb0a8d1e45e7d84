"""How the extend kernel is launched, and which tokens each of its programs answers.

    S sequences   P programs per kv head   TOKENS that a program answers

    query_start   [S + 1] int32    first token of each sequence
    tiles         [P, 2] int32     sequence, or -1 for none, and number of the run of tokens in it

The grid is (P,), P a bound that the host knows; every program sums the S lengths for itself. The
last runs of the last sequence come first: those of one sequence in order of falling work.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PARTS = 16
MIN_PART = 4
"""Tiles in a part, at least: less would take longer to merge than to compute."""


@dataclass(frozen=True, slots=True)
class ExtendConfig:
    """How the extend kernel is launched."""

    queries: int
    """Rows of a program; tokens times the heads that share keys."""

    keys: int
    """Positions in a tile."""

    num_warps: int

    num_stages: int
    """Tiles in flight or in use."""

    max_registers: int | None = None
    """Per thread: fewer let two programs share a multiprocessor, so that one multiplies while the
    other takes exponents."""

    descriptors: bool = False
    """Load tiles through tensor descriptors (TMA), from compute capability 9.0 on."""


_FAST = ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 16, 4, 1))
_EXACT = ((32, 32, 4, 1), (16, 16, 4, 1))  # float32 has no use for tensor cores


@cache
def choose_extend(
    head_dim: int,
    dtype: torch.dtype,
    group: int,
    shared_memory: int,
    *,
    can_describe: bool = False,
) -> ExtendConfig:
    """The best that fits `shared_memory` bytes per program, for `group` heads that share keys.

    `can_describe` says that tiles can be loaded through tensor descriptors: where they can, these
    are the settings that were fastest on an H200 (`bench/kernels.py --tune extend`).
    """
    if can_describe and dtype != torch.float32 and head_dim in (64, 128) and group <= 32:
        if group <= 2:
            return ExtendConfig(64, 64, 4, 3, None, descriptors=True)
        return ExtendConfig(128, 64, 8, 2, 128, descriptors=True)
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    if dtype == torch.float32:
        shared_memory = min(shared_memory, 1 << 16)  # larger tiles spill, and compile for minutes
    for queries, keys, num_warps, num_stages in _EXACT if dtype == torch.float32 else _FAST:
        needed = (queries + 2 * keys * num_stages) * row_bytes
        if needed <= shared_memory and queries >= group:
            return ExtendConfig(queries, keys, num_warps, num_stages)
    return ExtendConfig(max(16, triton.next_power_of_2(group)), 16, 4, 1)


def num_parts(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    max_context_len: int,
    num_sms: int,
    config: ExtendConfig,
) -> int:
    """Parts to cut the keys in, where tokens alone would leave multiprocessors without work."""
    runs = max(num_tokens * num_heads // (num_kv_heads * config.queries), 1)
    useful = -(-max_context_len // (MIN_PART * config.keys))
    return max(1, min(MAX_PARTS, useful, num_sms // (runs * num_kv_heads)))


@triton.jit(do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=["query_start"])
def _tile_list_kernel(query_start, tiles, num_sequences, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = 0
    for base in range(0, num_sequences, BLOCK):
        exists = base + lane < num_sequences
        start = tl.load(query_start + base + lane, exists, 0)
        stop = tl.load(query_start + base + lane + 1, exists, 0)
        total += tl.sum(tl.cdiv(stop - start, TOKENS))
    tile = total - 1 - program
    sequence = 0
    before = 0  # tiles of all sequences that end at or before `tile`
    seen = 0
    for base in range(0, num_sequences, BLOCK):
        exists = base + lane < num_sequences
        start = tl.load(query_start + base + lane, exists, 0)
        stop = tl.load(query_start + base + lane + 1, exists, 0)
        count = tl.cdiv(stop - start, TOKENS)
        end = seen + tl.cumsum(count)
        passed = exists & (end <= tile)
        sequence += tl.sum(passed.to(tl.int32))
        before += tl.sum(tl.where(passed, count, 0))
        seen += tl.sum(count)
    tl.store(tiles + program * 2, tl.where(tile >= 0, sequence, -1))
    tl.store(tiles + program * 2 + 1, tile - before)


def build_tile_list(query_start: Tensor, num_tokens: int, tokens: int) -> Tensor:
    """Cut S sequences, of at most num_tokens in all, in runs of `tokens`: the `tiles` [P, 2]."""
    num_sequences = query_start.shape[0] - 1
    programs = num_tokens // tokens + min(num_sequences, num_tokens)
    tiles = torch.empty((programs, 2), dtype=torch.int32, device=query_start.device)
    _tile_list_kernel[(programs,)](
        query_start, tiles, num_sequences, TOKENS=tokens, BLOCK=1024, num_warps=4
    )
    return tiles
