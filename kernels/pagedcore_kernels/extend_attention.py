"""Attention of several new tokens per sequence over its cached keys and values: prefill, extend.

    T tokens     S sequences               H query heads     K kv heads     G = H / K
    N blocks     B positions per block     M table entries per row          D head size
    P programs per kv head

    query                    [T, (H + 2K) * D]  the first H * D columns; T may have any stride
    key_cache, value_cache   [N, K, B, D]       contiguous; hold the step's own keys already; the
                                                query's dtype, float8_e4m3fn or int8
    key_scale, value_scale   [N, K, B] float32  contiguous; of int8 alone
    block_table              [R, M] int32       indexed by rows [S] int32
    query_start              [S + 1] int32      first token of each sequence
    context_len              [S] int32          positions with the step's own
    tiles                    [P, 2] int32       sequence and index of each program's tokens
    sinks                    [H] float32        a score of each head that has no value; or none
    out                      [T, H * D]         contiguous, same dtype as query

A program answers TOKENS = QUERIES // G tokens of one sequence for all G heads that share a kv head:
QUERIES rows of a matrix product, so keys are read once for all of them and a short extension still
fills its rows. The grid is (P, K, PARTS), from bounds that the host knows. Which tokens a program
answers is looked up in `tiles`, which one launch lays out for all layers of a step (`extend_plan`);
a program without work ends at once. Where tokens are few the keys are cut in PARTS, each a program,
whose pieces a second kernel merges (`extend_merge`).

It walks over the positions in tiles of KEYS. Tiles that every query of the program sees are neither
masked nor bounded; those on the causal diagonal and on the edge of the window are masked, and
values that no query sees are zeroed, so what lies in a block behind the context or in front of the
window never takes part. The softmax is online, in float32, with base 2. The block of a tile is
looked up one tile ahead, so that the loads of keys and values depend on nothing that is still on
its way.

It computes 4 * H * D operations for each pair of query and visible position, and reads
2 * K * D * itemsize bytes of each visible position once for every TOKENS tokens, mostly from the
L2 cache: 128 rows make that about 128 operations a byte, so the tensor cores are the limit. With
int8 it is slower than in 16 bits, not faster: each score and each probability has one more factor.

`TorchOps.attention` is the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pagedcore_kernels.decode_attention import sink_weight
from pagedcore_kernels.extend_merge import merge_parts
from pagedcore_kernels.extend_plan import MIN_PART, ExtendConfig
from pagedcore_kernels.extend_tiles import block_ids, load_scales, load_tile
from pagedcore_kernels.kept_types import multiplied_type

LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    queries,
    keys,
    values,
    key_scale,
    value_scale,
    visible,
    peak,
    weight,
    total,
    scale,
    soft_cap,
    HAS_SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax over a tile of keys [KEYS, D] and values."""
    keys, values = keys.to(queries.dtype), values.to(queries.dtype)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if HAS_SCALES:
        scores *= key_scale[None, :]
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
        if MASKED:  # where a row sees nothing, the difference above is what a product is rounded by
            probs = tl.where(visible, probs, 0.0)
    factor = tl.exp2(peak - new_peak)
    weight = weight * factor + tl.sum(probs, 1)
    total = total * factor[:, None]
    if HAS_SCALES:
        probs *= value_scale[None, :]
    total = tl.dot(probs.to(values.dtype), values, total, input_precision=PRECISION)
    return new_peak, weight, total


@triton.jit
def _attend_masked(
    begin,
    stop,
    queries,
    position,
    lowest,
    end,
    peak,
    weight,
    total,
    table,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
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
    DESCRIPTORS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Attend to the positions begin .. stop - 1, of which each query sees a part."""
    for base in range(begin, stop, KEYS):
        blocks = block_ids(table, base, end, B, KEYS)
        keys, values = load_tile(
            key_cache, value_cache, blocks, base, lowest, end, kv_head,
            NUM_KV_HEADS, B, D, KEYS, D_PAD, True, DESCRIPTORS,
        )  # fmt: skip
        scale_of_keys, scale_of_values = load_scales(
            key_scale, value_scale, blocks, base, lowest, end, kv_head,
            NUM_KV_HEADS, B, KEYS, True, HAS_SCALES,
        )  # fmt: skip
        key = base + tl.arange(0, KEYS)
        visible = key[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= key[None, :] > position[:, None] - WINDOW
        peak, weight, total = _attend(
            queries, keys, values, scale_of_keys, scale_of_values, visible, peak, weight, total,
            scale, soft_cap, HAS_SOFT_CAP, True, HAS_SCALES, PRECISION,
        )  # fmt: skip
    return peak, weight, total


_UNALIGNED = ["query_start", "rows", "context_len"]  # parts of a step's arrays, from any sequence


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=_UNALIGNED)
def _extend_kernel(
    query,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    sinks,
    out,
    pieces,
    stats,
    tiles,
    query_start,
    rows,
    context_len,
    block_table,
    num_tokens,
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
    HAS_SINKS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
):
    sequence = tl.load(tiles + tl.program_id(0) * 2)
    if sequence < 0:
        return
    run: tl.constexpr = QUERIES // G
    first = tl.load(tiles + tl.program_id(0) * 2 + 1) * run
    kv_head = tl.program_id(1)
    start = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - start
    past = tl.load(context_len + sequence) - count
    table = block_table + tl.load(rows + sequence).to(tl.int64) * block_table_stride

    row = tl.arange(0, QUERIES)
    column = tl.arange(0, D_PAD)
    token = first + row // G
    exists = (row < run * G) & (token < count)
    inside = exists[:, None] & (column < D)[None, :]
    head = kv_head * G + row % G
    position = past + token

    oldest = past + first
    end = past + tl.minimum(first + run, count)
    full_end = (oldest + 1) // KEYS * KEYS
    lowest = 0
    begin = 0
    full_begin = 0
    if WINDOW > 0:
        lowest = tl.maximum(oldest - WINDOW + 1, 0)
        begin = lowest // KEYS * KEYS
        full_begin = tl.cdiv(tl.maximum(end - WINDOW, 0), KEYS) * KEYS
        full_begin = tl.minimum(full_begin, tl.maximum(full_end, begin))
    stop = end
    if IS_SPLIT:
        part = tl.cdiv(tl.cdiv(end - begin, KEYS), tl.num_programs(2))
        begin += tl.program_id(2) * tl.maximum(part, LEAST) * KEYS
        stop = tl.minimum(end, begin + tl.maximum(part, LEAST) * KEYS)
    peak = tl.full([QUERIES], -1e30, tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES, D_PAD], tl.float32)
    if begin < stop:
        source = query + (start + token).to(tl.int64)[:, None] * query_stride
        queries = tl.load(source + head[:, None] * D + column[None, :], inside, 0.0).to(COMPUTE)
        if WINDOW > 0:
            peak, weight, total = _attend_masked(
                begin, tl.minimum(full_begin, stop), queries, position, lowest, end, peak, weight,
                total, table, key_cache, value_cache, key_scale, value_scale, kv_head, scale,
                soft_cap, NUM_KV_HEADS, B, D, WINDOW, HAS_SOFT_CAP, KEYS, D_PAD, PRECISION,
                DESCRIPTORS, HAS_SCALES,
            )  # fmt: skip
        full_begin = tl.maximum(full_begin, begin)
        full_stop = tl.minimum(full_end, stop)
        blocks = block_ids(table, full_begin, end, B, KEYS)
        for base in range(full_begin, full_stop, KEYS):
            keys, values = load_tile(
                key_cache, value_cache, blocks, base, lowest, end, kv_head,
                NUM_KV_HEADS, B, D, KEYS, D_PAD, False, DESCRIPTORS,
            )  # fmt: skip
            scale_of_keys, scale_of_values = load_scales(
                key_scale, value_scale, blocks, base, lowest, end, kv_head,
                NUM_KV_HEADS, B, KEYS, False, HAS_SCALES,
            )  # fmt: skip
            blocks = block_ids(table, base + KEYS, end, B, KEYS)
            peak, weight, total = _attend(
                queries, keys, values, scale_of_keys, scale_of_values, None, peak, weight, total,
                scale, soft_cap, HAS_SOFT_CAP, False, HAS_SCALES, PRECISION,
            )  # fmt: skip
        peak, weight, total = _attend_masked(
            tl.maximum(full_begin, full_end), stop, queries, position, lowest, end, peak, weight,
            total, table, key_cache, value_cache, key_scale, value_scale, kv_head, scale,
            soft_cap, NUM_KV_HEADS, B, D, WINDOW, HAS_SOFT_CAP, KEYS, D_PAD, PRECISION,
            DESCRIPTORS, HAS_SCALES,
        )  # fmt: skip
    target = (start + token) * (NUM_KV_HEADS * G) + head
    if IS_SPLIT:
        target += tl.program_id(2) * num_tokens * (NUM_KV_HEADS * G)
        tl.store(stats + target * 2, peak, exists)
        tl.store(stats + target * 2 + 1, weight, exists)
        if begin < stop:
            tl.store(pieces + target.to(tl.int64)[:, None] * D + column[None, :], total, inside)
    else:
        if HAS_SINKS:
            weight += sink_weight(sinks, peak, head, exists)
        total = total / tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(out + target.to(tl.int64)[:, None] * D + column[None, :], total, inside)


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
    scales: tuple[Tensor, Tensor] | None = None,
    first_token: int = 0,
    parts: int = 1,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    config: ExtendConfig,
) -> None:
    """Write the attention of the sequences' tokens, from `first_token` on, into out [T, H * D].

    `tiles` comes from `build_tile_list`, with config.queries // G tokens. Tokens that no sequence
    holds get no meaningful value. The keys of each run of tokens are cut in `parts`. `scales` are
    those of keys and of values.
    """
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    group, num_tokens = num_heads // num_kv_heads, query.shape[0]
    assert group * num_kv_heads == num_heads and group <= config.queries
    assert query.stride(1) == 1 and out.is_contiguous() and block_table.stride(1) == 1
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    assert scales is None or all(scale.is_contiguous() for scale in scales)
    assert rows.is_contiguous() and context_len.is_contiguous() and query_start.is_contiguous()
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
    head_dim_pad = triton.next_power_of_2(head_dim)
    descriptors = config.descriptors and config.keys <= block_size
    keys, values = key_cache, value_cache
    if descriptors:
        keys, values = (
            TensorDescriptor.from_tensor(cache.view(-1, head_dim), [config.keys, head_dim_pad])
            for cache in (key_cache, value_cache)
        )
    pieces = stats = out
    if parts > 1:
        shape = (parts, num_tokens, num_heads)
        pieces, stats = (
            torch.empty((*shape, width), dtype=torch.float32, device=query.device)
            for width in (head_dim, 2)
        )
    options = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    _extend_kernel[(tiles.shape[0], num_kv_heads, parts)](
        query,
        keys,
        values,
        *((out, out) if scales is None else scales),
        out if sinks is None else sinks,
        out,
        pieces,
        stats,
        tiles,
        query_start,
        rows,
        context_len,
        block_table,
        num_tokens,
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
        HAS_SINKS=sinks is not None,
        QUERIES=config.queries,
        KEYS=config.keys,
        D_PAD=head_dim_pad,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        COMPUTE=multiplied_type(query.dtype, key_cache.dtype),
        DESCRIPTORS=descriptors,
        HAS_SCALES=scales is not None,
        IS_SPLIT=parts > 1,
        LEAST=MIN_PART,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    if parts > 1:
        heads = out.view(num_tokens, num_heads, head_dim)
        merge_parts(pieces, stats, heads, first_token, sinks)
