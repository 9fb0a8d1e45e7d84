"""Causal attention over a paged cache, in plain torch.

    T tokens   S sequences of one token   Q queries of a longer one   H query heads   K kv heads
    G = H / K  D head size                N blocks   B positions per block   L positions, M blocks

    qkv     [T, (H + 2K) * D]
    store   [N, B, 2K, C]        keys of a slot, then its values: C codes of each, by its format;
                                 and [N, B, 2K] scales, where the format has them
    out     [T, H * D]

Sequences with one token are taken together, in *parts*: their blocks are gathered side by side, and
the G query heads that share keys stand where a prompt's tokens would. The others are taken one by
one, in *tiles* of queries; a prompt without history reads its keys from `qkv`. What the layers of a
step have in common is found out once, as a `Plan`, from lengths that are read on the host.

No sequence may read what another one left: not with its scores, where a mask helps, and not with a
weight of zero, where it does not, since 0 * NaN is NaN. So what a part gathers beyond a sequence's
end is zero or its own: table entries there are replaced by the null block, and a block is cleared
when its first slot is written (`begun_blocks`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.ops import LayerCache, StepBatch

_PART = 1 << 21
"""Elements of keys and values in a part, about: they should stay in the processor's caches."""

_TILE = 256
"""Queries of a tile. Keys after its last query are left out; its mask is this high."""


@dataclass(slots=True)
class _Part:
    """Sequences of one token each."""

    tokens: slice
    blocks: Tensor | slice
    """[S * M] int64: M blocks of each sequence; of one sequence a slice, if they lie together."""

    length: int
    """Positions that are used of each, at most M * B."""

    mask: Tensor | None
    """[S, 1, 1, length], added to scores: -inf where a sequence does not look."""


@dataclass(slots=True)
class _Prompt:
    """A sequence of several tokens."""

    tokens: slice
    blocks: Tensor | slice
    """[M] int64: its blocks from the first that one of its queries sees."""

    first: int
    """Position at which those blocks begin."""

    length: int
    """Positions of the sequence, the step's own included."""

    is_plain: bool
    """It has no history, and no query has a key out of its window."""


@dataclass(slots=True)
class Plan:
    """What the layers of one cache group share in a step."""

    parts: list[_Part]
    prompts: list[_Prompt]
    band: Tensor | None = None
    """See `_band`; made when a layer first needs it."""


def plan_attention(
    batch: StepBatch, group: int, block_size: int, spec: CacheSpec, dtype: torch.dtype
) -> Plan:
    """Find out what sequences see and where it lies, for queries of this type."""
    table = batch.block_tables[group]
    lengths, rows = batch.context_len.tolist(), batch.rows.tolist()
    starts = batch.query_start.tolist()
    limit = _PART // (2 * spec.num_kv_heads * spec.head_dim)
    parts = [
        _plan_part(batch, table, tokens, block_size, spec.window, dtype)
        for tokens in _split(lengths[: batch.num_single], spec.window, limit)
    ]
    prompts = []
    for i in range(batch.num_single, len(lengths)):
        length, earliest = lengths[i], lengths[i] - (starts[i + 1] - starts[i])
        first = 0 if spec.window is None else max(earliest - spec.window + 1, 0) // block_size
        prompts.append(
            _Prompt(
                slice(starts[i], starts[i + 1]),
                _side_by_side(table[rows[i], first : -(-length // block_size)].long()),
                first * block_size,
                length,
                is_plain=earliest == 0 and (spec.window is None or length <= spec.window),
            )
        )
    return Plan(parts, prompts)


def begun_blocks(slots: Tensor, block_size: int) -> Tensor:
    """Blocks [n] int64 whose first slot is among those that a step writes."""
    return slots[slots % block_size == 0] // block_size


def attend(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    cache: LayerCache,
    plan: Plan,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """See `pagedcore.execution.ops.Ops.attention`."""
    num_kv_heads, head_dim = cache.spec.num_kv_heads, cache.spec.head_dim
    heads = qkv.view(len(qkv), -1, head_dim)
    grouped = (num_kv_heads, num_heads // num_kv_heads, head_dim)
    query = heads[:, :num_heads].view(len(qkv), *grouped)
    if sinks is not None:
        sinks = sinks.view(*grouped[:2], 1)
    if len(plan.parts) == 1 and not plan.prompts:
        mixed = _attend_part(query, cache, plan.parts[0], scale, soft_cap, sinks)
        return mixed.reshape(len(qkv), -1)
    out = torch.empty(len(qkv), *grouped, dtype=qkv.dtype, device=qkv.device)
    for part in plan.parts:
        out[part.tokens] = _attend_part(query[part.tokens], cache, part, scale, soft_cap, sinks)
    for prompt in plan.prompts:
        tokens, is_usual = prompt.tokens, soft_cap is None and sinks is None
        if prompt.is_plain and is_usual and cache.kv_format.is_exact(qkv.dtype):
            keys_values = heads[tokens, num_heads:]
            key, value = _spread(keys_values, grouped)
            mixed = scaled_dot_product_attention(
                query[tokens].permute(1, 2, 0, 3), key, value, is_causal=True, scale=scale
            )
            out[tokens] = mixed.permute(2, 0, 1, 3)
        else:
            keys_values = gather(cache, prompt.blocks, qkv.dtype)[: prompt.length - prompt.first]
            for tile, keys, mask in tiles(prompt, plan, cache.spec.window, qkv):
                key, value = _spread(keys_values[keys], grouped)
                sink = None if sinks is None else sinks[..., None]
                mixed = attend_to(
                    query[tile].permute(1, 2, 0, 3), key, value, mask, scale, soft_cap, sink
                )
                out[tile] = mixed.permute(2, 0, 1, 3)
    return out.view(len(qkv), -1)


def _attend_part(
    query: Tensor,
    cache: LayerCache,
    part: _Part,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Queries [S, K, G, D] of sequences with one token each, sinks [K, G, 1]: query's shape."""
    keys_values = gather(cache, part.blocks, query.dtype)
    keys_values = keys_values.view(len(query), -1, *keys_values.shape[1:])[:, : part.length]
    key, value = keys_values.transpose(1, 2).chunk(2, 1)
    return attend_to(query, key, value, part.mask, scale, soft_cap, sinks)


def attend_to(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in four dimensions, mask and sinks broadcast; query's shape."""
    if soft_cap is None and sinks is None:
        return scaled_dot_product_attention(query, key, value, mask, scale=scale)
    scores = query.float() @ key.float().mT * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores += mask
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
        weights = scores.softmax(-1)[..., :-1]
    return (weights @ value.float()).to(query.dtype)


def gather(cache: LayerCache, blocks: Tensor | slice, dtype: torch.dtype) -> Tensor:
    """The slots of blocks, one after the other: [M * B, 2K, D]."""
    codes = _slots_of(cache.key, blocks)
    scale = None if cache.key_scale is None else _slots_of(cache.key_scale, blocks)
    return cache.kv_format.decode(codes, scale, dtype)


def _slots_of(store: Tensor, blocks: Tensor | slice) -> Tensor:
    """Of store [N, B, ...]: [M * B, ...]."""
    found = store[blocks] if isinstance(blocks, slice) else store.index_select(0, blocks)
    return found.flatten(0, 1)


def _spread(keys_values: Tensor, grouped: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Keys and values [L, 2K, D], once for each query head: [K, G, L, D] twice, without a copy."""
    num_kv_heads, size, head_dim = grouped
    heads = keys_values.transpose(0, 1)[:, None]
    heads = heads.expand(2 * num_kv_heads, size, len(keys_values), head_dim)
    return heads[:num_kv_heads], heads[num_kv_heads:]


def _split(lengths: list[int], window: int | None, limit: int) -> Iterator[slice]:
    """Cut a list of sequences so that each part, padded to its longest, is within the limit."""
    start = longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length if window is None else min(length, window))
        if i > start and longest * (i + 1 - start) > limit:
            yield slice(start, i)
            start, longest = i, length
    if lengths:
        yield slice(start, len(lengths))


def _plan_part(
    batch: StepBatch,
    table: Tensor,
    tokens: slice,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> _Part:
    """Look up the blocks of sequences with one token each. Padding sees one slot, of block 0."""
    end = batch.context_len[tokens].clamp(min=1)[:, None]
    begin = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
    first, last = begin // block_size, (end - 1) // block_size
    length = int((end - first * block_size).max())
    column = first + torch.arange(-(-length // block_size), device=table.device)
    blocks = table.index_select(0, batch.rows[tokens]).gather(1, column.minimum(last).long())
    blocks = blocks.masked_fill(column > last, 0).long().flatten()
    position = first * block_size + torch.arange(length, device=table.device)
    hidden = (position < begin) | (position >= end)
    mask = None
    if bool(hidden.any()):
        mask = torch.zeros(hidden.shape, dtype=dtype, device=table.device)
        mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
    return _Part(tokens, _side_by_side(blocks) if len(end) == 1 else blocks, length, mask)


def _side_by_side(blocks: Tensor) -> Tensor | slice:
    """The same blocks as a slice, if they follow each other: then nothing has to be gathered."""
    ids = blocks.tolist()
    start, stop = ids[0], ids[0] + len(ids)
    return slice(start, stop) if ids == list(range(start, stop)) else blocks


def tiles(
    prompt: _Prompt, plan: Plan, window: int | None, qkv: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tokens of a tile, keys relative to `prompt.first`, and the mask [Q, L] over them."""
    if plan.band is None:
        longest = max(other.length - other.first for other in plan.prompts)
        plan.band = _band(longest, window, qkv)
    history = plan.band.shape[1] - _TILE
    for start in range(prompt.tokens.start, prompt.tokens.stop, _TILE):
        stop = min(start + _TILE, prompt.tokens.stop)
        position = prompt.length - (prompt.tokens.stop - start)
        begin = prompt.first if window is None else max(position - window + 1, prompt.first)
        end = position + stop - start
        mask = plan.band[: stop - start, history + begin - position : history + end - position]
        yield slice(start, stop), slice(begin - prompt.first, end - prompt.first), mask


def _band(history: int, window: int | None, qkv: Tensor) -> Tensor:
    """A mask [_TILE, history + _TILE] that every tile's mask is cut out of.

    Column `history + i` is the key of query i; those on its right are -inf, and those that are
    `window` or more on its left.
    """
    query = torch.arange(_TILE, device=qkv.device)[:, None]
    behind = query - torch.arange(-history, _TILE, device=qkv.device)
    hidden = behind < 0
    if window is not None:
        hidden |= behind >= window
    mask = torch.zeros(hidden.shape, dtype=qkv.dtype, device=qkv.device)
    return mask.masked_fill_(hidden, -torch.inf)
