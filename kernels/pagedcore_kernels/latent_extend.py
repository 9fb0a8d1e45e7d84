"""Attention of several new tokens per sequence over its latent vectors (MLA): prefill, extend.

    T tokens     S sequences               H query heads     G heads that a program answers
    N blocks     B positions per block     M table entries per row
    D elements of a latent vector, of which the first V are mixed, and R others turn
    P programs per group of heads

    query          [T, H, D]       contiguous
    cache          [N, 1, B, D]    contiguous; holds the step's own vectors already; the query's
                                   dtype or float8_e4m3fn
    block_table    [R, M] int32    indexed by rows [S] int32
    query_start    [S + 1] int32   first token of each sequence
    context_len    [S] int32       positions with the step's own
    tiles          [P, 2] int32    sequence and index of each program's tokens; see `extend_plan`
    out            [T, H, V]       contiguous, same dtype as query

This is `extend_attention` with one kv head that all query heads share, whose values are the first V
elements of its keys. A program answers QUERIES // G tokens of one sequence for G heads. Tiles that
all of them see are not masked; what lies behind the context never takes part. The grid is
(P, H / G, PARTS), where few tokens have their positions cut in PARTS that `extend_merge` merges.

It computes 2 * H * (D + V) operations for each pair of token and visible position, so the tensor
cores are the limit.

`TorchOps.latent_attention` is the specification.
"""

from functools import cache as remember

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore_kernels.decode_attention import LOG2_E, MIN_ROWS
from pagedcore_kernels.extend_merge import merge_parts
from pagedcore_kernels.extend_plan import MIN_PART, ExtendConfig
from pagedcore_kernels.extend_tiles import block_ids
from pagedcore_kernels.latent_decode import MOST_HEADS, heads_together


@remember
def choose_latent_extend(
    size: int, dtype: torch.dtype, block_size: int, shared_memory: int
) -> ExtendConfig:
    """The largest tiles that fit `shared_memory` bytes, for vectors of `size` elements."""
    if dtype == torch.float32:  # larger tiles spill, and compile for minutes
        return ExtendConfig(16, min(16, block_size), 4, 1)
    for queries, keys, num_stages in ((64, 32, 2), (32, 32, 2), (16, 16, 2)):
        needed = (queries + num_stages * keys) * size * dtype.itemsize + 16 * 1024
        if needed <= shared_memory:
            return ExtendConfig(queries, min(keys, block_size), 8, num_stages)
    return ExtendConfig(16, min(16, block_size), 4, 1)


@triton.jit
def _attend_tiles(
    begin,
    stop,
    queries,
    queries_turned,
    position,
    end,
    peak,
    weight,
    total,
    table,
    cache,
    scale,
    B: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    KEYS: tl.constexpr,
    V_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax over positions begin .. stop - 1; if MASKED, up to each query's own."""
    key = tl.arange(0, KEYS)
    column = tl.arange(0, V_PAD)
    turned = tl.arange(0, R_PAD)
    blocks = block_ids(table, begin, end, B, KEYS)
    for base in range(begin, stop, KEYS):
        slot = blocks.to(tl.int64) * B + (base + key) % B
        vectors = cache + slot[:, None] * (V + R)
        in_fixed = (column < V)[None, :]
        in_turned = (turned < R)[None, :]
        if MASKED:
            exists = (base + key < end)[:, None]
            fixed = tl.load(vectors + column[None, :], exists & in_fixed, 0.0)
            keys = tl.load(vectors + V + turned[None, :], exists & in_turned, 0.0)
        else:
            fixed = tl.load(vectors + column[None, :], in_fixed, 0.0)
            keys = tl.load(vectors + V + turned[None, :], in_turned, 0.0)
        blocks = block_ids(table, base + KEYS, end, B, KEYS)
        fixed, keys = fixed.to(queries.dtype), keys.to(queries.dtype)
        scores = tl.dot(queries, tl.trans(fixed), input_precision=PRECISION)
        scores = tl.dot(queries_turned, tl.trans(keys), scores, input_precision=PRECISION) * scale
        if MASKED:
            scores = tl.where((base + key)[None, :] <= position[:, None], scores, -1e30)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        factor = tl.exp2(peak - new_peak)
        probs = tl.exp2(scores - new_peak[:, None])
        weight = weight * factor + tl.sum(probs, 1)
        total = total * factor[:, None]
        total = tl.dot(probs.to(fixed.dtype), fixed, total, input_precision=PRECISION)
        peak = new_peak
    return peak, weight, total


_UNALIGNED = ["query_start", "rows", "context_len"]  # parts of a step's arrays, from any sequence


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=_UNALIGNED)
def _latent_extend_kernel(
    query,
    cache,
    out,
    pieces,
    stats,
    tiles,
    query_start,
    rows,
    context_len,
    block_table,
    num_tokens,
    block_table_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    V_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
):
    sequence = tl.load(tiles + tl.program_id(0) * 2)
    if sequence < 0:
        return
    run: tl.constexpr = QUERIES // G
    first = tl.load(tiles + tl.program_id(0) * 2 + 1) * run
    start = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - start
    past = tl.load(context_len + sequence) - count
    table = block_table + tl.load(rows + sequence).to(tl.int64) * block_table_stride

    row = tl.arange(0, QUERIES)
    column = tl.arange(0, V_PAD)
    turned = tl.arange(0, R_PAD)
    token = first + row // G
    exists = (row < run * G) & (token < count)
    inside = exists[:, None] & (column < V)[None, :]
    head = tl.program_id(1) * G + row % G
    position = past + token

    end = past + tl.minimum(first + run, count)
    full_end = (past + first + 1) // KEYS * KEYS
    begin = 0
    stop = end
    if IS_SPLIT:
        part = tl.maximum(tl.cdiv(tl.cdiv(end, KEYS), tl.num_programs(2)), LEAST)
        begin = tl.program_id(2) * part * KEYS
        stop = tl.minimum(end, begin + part * KEYS)
    peak = tl.full([QUERIES], -1e30, tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES, V_PAD], tl.float32)
    target = (start + token).to(tl.int64) * NUM_HEADS + head
    if begin < stop:
        source = query + target[:, None] * (V + R)
        queries = tl.load(source + column[None, :], inside, 0.0)
        is_turned = exists[:, None] & (turned < R)[None, :]
        queries_turned = tl.load(source + V + turned[None, :], is_turned, 0.0)
        full_stop = tl.minimum(full_end, stop)
        peak, weight, total = _attend_tiles(
            begin, full_stop, queries, queries_turned, position, end, peak, weight, total,
            table, cache, scale, B, V, R, KEYS, V_PAD, R_PAD, False, PRECISION,
        )  # fmt: skip
        peak, weight, total = _attend_tiles(
            tl.maximum(begin, full_end), stop, queries, queries_turned, position, end, peak,
            weight, total, table, cache, scale, B, V, R, KEYS, V_PAD, R_PAD, True, PRECISION,
        )  # fmt: skip
    if IS_SPLIT:
        target += tl.program_id(2).to(tl.int64) * num_tokens * NUM_HEADS
        tl.store(stats + target * 2, peak, exists)
        tl.store(stats + target * 2 + 1, weight, exists)
        if begin < stop:
            tl.store(pieces + target[:, None] * V + column[None, :], total, inside)
    else:
        share = 1 / tl.where(weight > 0, weight, 1.0)
        tl.store(out + target[:, None] * V + column[None, :], total * share[:, None], inside)


def latent_extend(
    query: Tensor,
    scale: float,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    rows: Tensor,
    context_len: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    first_token: int,
    parts: int,
    config: ExtendConfig,
) -> None:
    """Write the attention of the sequences' tokens, from `first_token` on, into out [T, H, V].

    `tiles` comes from `build_tile_list`, with config.queries // G tokens, where G is
    heads_together(H, min(config.queries, MOST_HEADS)). Positions are cut in `parts`.
    """
    num_tokens, num_heads, size = query.shape
    num_values, block_size = out.shape[2], cache.shape[2]
    heads = heads_together(num_heads, min(config.queries, MOST_HEADS))
    assert query.is_contiguous() and out.is_contiguous() and cache.is_contiguous()
    assert rows.is_contiguous() and context_len.is_contiguous() and query_start.is_contiguous()
    assert block_table.stride(1) == 1
    pieces = stats = out
    if parts > 1:
        shape = (parts, num_tokens, num_heads)
        pieces, stats = (
            torch.empty((*shape, width), dtype=torch.float32, device=query.device)
            for width in (num_values, 2)
        )
    _latent_extend_kernel[(tiles.shape[0], num_heads // heads, parts)](
        query,
        cache,
        out,
        pieces,
        stats,
        tiles,
        query_start,
        rows,
        context_len,
        block_table,
        num_tokens,
        block_table.stride(0),
        scale * LOG2_E,
        NUM_HEADS=num_heads,
        G=heads,
        V=num_values,
        R=size - num_values,
        B=block_size,
        QUERIES=config.queries,
        KEYS=config.keys,
        V_PAD=max(MIN_ROWS, triton.next_power_of_2(num_values)),
        R_PAD=max(MIN_ROWS, triton.next_power_of_2(size - num_values)),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        IS_SPLIT=parts > 1,
        LEAST=MIN_PART,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if parts > 1:
        merge_parts(pieces, stats, out, first_token)
