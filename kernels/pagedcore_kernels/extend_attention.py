"""Attention of several new tokens per sequence over its cached keys and values: prefill, extend.

    T tokens     S sequences               H query heads     K kv heads     G = H / K
    N blocks     B positions per block     M table entries per row          D head size
    P programs per kv head

    query                    [T, (H + 2K) * D]  the first H * D columns; T may have any stride
    key_cache, value_cache   [N, K, B, D]       contiguous; hold the step's own keys already; the
                                                query's dtype or float8_e4m3fn
    block_table              [R, M] int32       indexed by rows [S] int32
    query_start              [S + 1] int32      first token of each sequence
    context_len              [S] int32          positions with the step's own
    tiles                    [P, 2] int32       sequence and index of each program's tokens
    out                      [T, H * D]         contiguous, same dtype as query

A program answers TOKENS = QUERIES // G tokens of one sequence for all G heads that share a kv head:
QUERIES rows of a matrix product, so keys are read once for all of them and a short extension still
fills its rows. The grid is (P, K), from a bound that the host knows. Which tokens a program answers
is looked up in `tiles`, which one launch lays out for all layers of a step: a sequence's last
tokens, which have most keys, come first; a program without work ends at once.

It walks over the positions in tiles of KEYS. Tiles that every query of the program sees are neither
masked nor bounded; those on the causal diagonal and on the edge of the window are masked, in the
load too, so what lies in a block behind the context never takes part. The softmax is online, in
float32, with base 2. The block of a tile is looked up one tile ahead, so that the loads of keys and
values depend on nothing that is still on its way.

It computes 4 * H * D operations for each pair of query and visible position, and reads
2 * K * D * itemsize bytes of each visible position once for every TOKENS tokens, mostly from the
L2 cache: 128 rows make that about 128 operations a byte, so the tensor cores are the limit.

`TorchOps.attention` is the specification.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


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


_FAST = ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 16, 4, 1))
_EXACT = ((32, 32, 4, 1), (16, 16, 4, 1))  # float32 has no use for tensor cores


@cache
def choose_extend(
    head_dim: int, dtype: torch.dtype, group: int, shared_memory: int
) -> ExtendConfig:
    """The best that fits `shared_memory` bytes per program, for `group` heads that share keys."""
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    if dtype == torch.float32:
        shared_memory = min(shared_memory, 1 << 16)  # larger tiles spill, and compile for minutes
    for queries, keys, num_warps, num_stages in _EXACT if dtype == torch.float32 else _FAST:
        needed = (queries + 2 * keys * num_stages) * row_bytes
        if needed <= shared_memory and queries >= group:
            return ExtendConfig(queries, keys, num_warps, num_stages)
    return ExtendConfig(max(16, triton.next_power_of_2(group)), 16, 4, 1)


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


@triton.jit
def _block_ids(table, base, end, B: tl.constexpr, KEYS: tl.constexpr):
    """Blocks of the positions base .. base + KEYS - 1: one number if they lie in one block."""
    if KEYS <= B:
        blocks = tl.load(table + base // B, base < end, 0)
    else:
        position = base + tl.arange(0, KEYS)
        blocks = tl.load(table + position // B, position < end, 0)
    return blocks


@triton.jit
def _in_cache(
    blocks,
    base,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Offsets [KEYS, D] in the cache of the positions base .. base + KEYS - 1."""
    key = tl.arange(0, KEYS)
    column = tl.arange(0, D_PAD)
    if KEYS <= B:
        start = (blocks.to(tl.int64) * NUM_KV_HEADS + kv_head) * B + base % B
        offsets = start * D + (key[:, None] * D + column[None, :])
    else:
        row = (blocks.to(tl.int64) * NUM_KV_HEADS + kv_head) * B + (base + key) % B
        offsets = row[:, None] * D + column[None, :]
    return offsets


@triton.jit
def _attend(
    queries,
    keys,
    values,
    visible,
    peak,
    weight,
    total,
    scale,
    soft_cap,
    HAS_SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax over a tile of keys [KEYS, D] and values."""
    keys, values = keys.to(queries.dtype), values.to(queries.dtype)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if HAS_SOFT_CAP:  # scale holds 2 / cap: tanh(x) = 2 * sigmoid(2x) - 1
        scores = (2 * tl.sigmoid(scores * scale) - 1) * soft_cap
        if MASKED:
            scores = tl.where(visible, scores, -1e30)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        probs = tl.exp2(scores - new_peak[:, None])
    else:
        if MASKED:
            scores = tl.where(visible, scores, -1e30)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        probs = tl.exp2(scores * scale - new_peak[:, None])
    factor = tl.exp2(peak - new_peak)
    weight = weight * factor + tl.sum(probs, 1)
    total = total * factor[:, None]
    total = tl.dot(probs.to(values.dtype), values, total, input_precision=PRECISION)
    return new_peak, weight, total


@triton.jit
def _attend_masked(
    begin,
    end,
    queries,
    position,
    peak,
    weight,
    total,
    table,
    key_cache,
    value_cache,
    kv_head,
    scale,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    KEYS: tl.constexpr,
    D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to the positions begin .. end - 1, of which each query sees a part."""
    inside = (tl.arange(0, D_PAD) < D)[None, :]
    for base in range(begin, end, KEYS):
        blocks = _block_ids(table, base, end, B, KEYS)
        offsets = _in_cache(blocks, base, kv_head, NUM_KV_HEADS, B, D, KEYS, D_PAD)
        key = base + tl.arange(0, KEYS)
        loaded = (key < end)[:, None] & inside
        keys = tl.load(key_cache + offsets, loaded, 0.0)
        values = tl.load(value_cache + offsets, loaded, 0.0)
        visible = key[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= key[None, :] > position[:, None] - WINDOW
        peak, weight, total = _attend(
            queries, keys, values, visible, peak, weight, total, scale, soft_cap,
            HAS_SOFT_CAP, True, PRECISION,
        )  # fmt: skip
    return peak, weight, total


_UNALIGNED = ["query_start", "rows", "context_len"]  # parts of a step's arrays, from any sequence


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _extend_kernel(
    query,
    key_cache,
    value_cache,
    out,
    tiles,
    query_start,
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
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_FP8: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    sequence = tl.load(tiles + tl.program_id(0) * 2)
    if sequence < 0:
        return
    tokens: tl.constexpr = QUERIES // G
    first = tl.load(tiles + tl.program_id(0) * 2 + 1) * tokens
    kv_head = tl.program_id(1)
    start = tl.load(query_start + sequence)
    num_tokens = tl.load(query_start + sequence + 1) - start
    past = tl.load(context_len + sequence) - num_tokens
    table = block_table + tl.load(rows + sequence).to(tl.int64) * block_table_stride

    row = tl.arange(0, QUERIES)
    column = tl.arange(0, D_PAD)
    token = first + row // G
    exists = (row < tokens * G) & (token < num_tokens)
    inside = exists[:, None] & (column < D)[None, :]
    head = kv_head * G + row % G
    source = query + (start + token).to(tl.int64)[:, None] * query_stride
    queries = tl.load(source + head[:, None] * D + column[None, :], inside, 0.0)
    if IS_FP8:  # 8-bit keys are exact in float16
        queries = queries.to(COMPUTE)
    position = past + token

    oldest = past + first
    end = past + tl.minimum(first + tokens, num_tokens)
    full_end = (oldest + 1) // KEYS * KEYS
    peak = tl.full([QUERIES], -1e30, tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES, D_PAD], tl.float32)
    full_begin = 0
    if WINDOW > 0:
        begin = tl.maximum(oldest - WINDOW + 1, 0) // KEYS * KEYS
        full_begin = tl.cdiv(tl.maximum(end - WINDOW, 0), KEYS) * KEYS
        full_begin = tl.minimum(full_begin, tl.maximum(full_end, begin))
        peak, weight, total = _attend_masked(
            begin, full_begin, queries, position, peak, weight, total, table, key_cache,
            value_cache, kv_head, scale, soft_cap, NUM_KV_HEADS, B, D, WINDOW, HAS_SOFT_CAP, KEYS,
            D_PAD, PRECISION,
        )  # fmt: skip

    blocks = _block_ids(table, full_begin, end, B, KEYS)
    for base in range(full_begin, full_end, KEYS):
        offsets = _in_cache(blocks, base, kv_head, NUM_KV_HEADS, B, D, KEYS, D_PAD)
        if D == D_PAD:
            keys = tl.load(key_cache + offsets)
            values = tl.load(value_cache + offsets)
        else:
            keys = tl.load(key_cache + offsets, (column < D)[None, :], 0.0)
            values = tl.load(value_cache + offsets, (column < D)[None, :], 0.0)
        blocks = _block_ids(table, base + KEYS, end, B, KEYS)
        peak, weight, total = _attend(
            queries, keys, values, None, peak, weight, total, scale, soft_cap,
            HAS_SOFT_CAP, False, PRECISION,
        )  # fmt: skip

    peak, weight, total = _attend_masked(
        tl.maximum(full_begin, full_end), end, queries, position, peak, weight, total, table,
        key_cache, value_cache, kv_head, scale, soft_cap, NUM_KV_HEADS, B, D, WINDOW, HAS_SOFT_CAP,
        KEYS, D_PAD, PRECISION,
    )  # fmt: skip
    total = total / tl.where(weight > 0, weight, 1.0)[:, None]
    target = out + (start + token).to(tl.int64)[:, None] * (NUM_KV_HEADS * G * D)
    tl.store(target + head[:, None] * D + column[None, :], total, inside)


def build_tile_list(query_start: Tensor, num_tokens: int, tokens: int) -> Tensor:
    """Cut S sequences, of at most num_tokens in all, in runs of `tokens`: the `tiles` [P, 2]."""
    num_sequences = query_start.shape[0] - 1
    programs = num_tokens // tokens + min(num_sequences, num_tokens)
    tiles = torch.empty((programs, 2), dtype=torch.int32, device=query_start.device)
    _tile_list_kernel[(programs,)](
        query_start, tiles, num_sequences, TOKENS=tokens, BLOCK=1024, num_warps=4
    )
    return tiles


def extend_attention(
    query: Tensor,
    num_heads: int,
    scale: float,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    rows: Tensor,
    context_len: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    config: ExtendConfig,
) -> None:
    """Write the attention of the sequences' tokens into out [T, H * D].

    `tiles` comes from `build_tile_list`, with config.queries // G tokens. Tokens that no sequence
    holds keep what `out` had.
    """
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    group = num_heads // num_kv_heads
    assert group * num_kv_heads == num_heads and group <= config.queries
    assert query.stride(1) == 1 and out.is_contiguous() and block_table.stride(1) == 1
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    assert rows.is_contiguous() and context_len.is_contiguous() and query_start.is_contiguous()
    _extend_kernel[(tiles.shape[0], num_kv_heads)](
        query,
        key_cache,
        value_cache,
        out,
        tiles,
        query_start,
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
        B=block_size,
        WINDOW=window or 0,
        HAS_SOFT_CAP=soft_cap is not None,
        QUERIES=config.queries,
        KEYS=config.keys,
        D_PAD=triton.next_power_of_2(head_dim),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        IS_FP8=key_cache.dtype == torch.float8_e4m3fn,
        COMPUTE=tl.float32 if query.dtype == torch.float32 else tl.float16,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
