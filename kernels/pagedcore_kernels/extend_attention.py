"""Attention of several new tokens per sequence over its cached keys and values: prefill, extend.

    T tokens     S sequences               H query heads     K kv heads     G = H / K
    N blocks     B positions per block     M table entries per row          D head size

    query                    [T, (H + 2K) * D]  the first H * D columns; T may have any stride
    key_cache, value_cache   [N, K, B, D]       contiguous; hold the step's own keys already
    block_table              [R, M] int32       indexed by rows [S] int32
    query_start              [S + 1] int32      first token of each sequence
    context_len              [S] int32          positions with the step's own
    out                      [T, H * D]         contiguous, same dtype as query

The grid is (cdiv(max_query_len, TOKENS), K, S), from bounds that the host knows; a program without
work ends at once, and those with most keys come first. A program answers TOKENS = QUERIES // G
tokens of one sequence for all G heads that share a kv head: QUERIES rows of a matrix product, so
keys are read once for all of them and a short extension still fills its rows.

It walks over the positions in tiles of KEYS. Tiles that every query of the program sees are neither
masked nor bounded; those on the causal diagonal and on the edge of the window are masked, in the
load too, so what lies in a block behind the context never takes part. The softmax is online, in
float32, with base 2.

It computes 4 * H * D operations for each pair of query and visible position, and reads
2 * K * D * itemsize bytes of each visible position once for every TOKENS tokens, mostly from the
L2 cache: 128 rows make that about 128 operations a byte, so the tensor cores are the limit.

`TorchOps.attention` is the specification.
"""

import triton
import triton.language as tl


@triton.jit
def _positions(
    table, base, kv_head, NUM_KV_HEADS: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr
):
    """Row numbers, in the cache as [N * K * B, D], of the positions base .. base + KEYS - 1."""
    position = base + tl.arange(0, KEYS)
    block = tl.load(table + position // B).to(tl.int64)
    return (block * NUM_KV_HEADS + kv_head) * B + position % B


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
