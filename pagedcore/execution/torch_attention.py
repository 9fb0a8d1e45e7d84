"""Causal attention over a paged cache in plain torch.

T tokens   S sequences   H query heads   K kv heads   D head size   L positions
N blocks   B positions per block         M table entries per row

qkv          [T, (H + 2K) * D]
key, value   [N, B, K, D]
"""

import torch
from torch import Tensor

from pagedcore.execution.ops import LayerCache, StepBatch


def attend(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    cache: LayerCache,
    batch: StepBatch,
    soft_cap: float | None,
) -> Tensor:
    """See `pagedcore.execution.ops.Ops.attention`."""
    head_dim = cache.spec.head_dim
    query = qkv[:, : num_heads * head_dim].view(len(qkv), num_heads, head_dim)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    starts = batch.query_start.tolist()
    for i, (length, row) in enumerate(
        zip(batch.context_len.tolist(), batch.rows.tolist(), strict=True)
    ):
        tokens = slice(starts[i], starts[i + 1])
        if length == 0:
            out[tokens] = 0
            continue
        num_blocks = -(-length // cache.block_size)
        blocks = batch.block_tables[cache.group, row, :num_blocks]
        key, value = (
            store.index_select(0, blocks).flatten(0, 1)[:length].to(qkv.dtype)
            for store in (cache.key, cache.value)
        )
        position = torch.arange(length, device=qkv.device)
        behind = batch.positions[tokens, None] - position
        visible = behind >= 0
        if cache.spec.window is not None:
            visible &= behind < cache.spec.window
        out[tokens] = _attend_one(query[tokens], key, value, visible, scale, soft_cap)
    return out.flatten(1)


def _attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    """Queries [Q, H, D] over keys and values [L, K, D] where visible [Q, L]: [Q, H, D]."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    grouped = query.view(num_tokens, num_kv_heads, -1, head_dim)
    scores = torch.einsum("qkgd,lkd->kgql", grouped, key).float() * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    mixed = torch.einsum("kgql,lkd->qkgd", weights.to(value.dtype), value)
    return mixed.reshape(num_tokens, num_heads, head_dim)
