"""Random steps over a paged cache, in the layout of the kernels, with NaN wherever nobody may look.

T tokens   S sequences   H query heads   K kv heads   D head size   B positions per block
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.kv_formats import KVFormat, as_is
from pagedcore.execution.ops import LayerCache, StepBatch


@dataclass(frozen=True, slots=True)
class PagedStep:
    """A step and one layer's cache, which holds the step's own keys already."""

    batch: StepBatch
    cache: LayerCache
    qkv: Tensor
    """[T, (H + 2K) * D], a part of wider rows."""

    num_heads: int
    """H"""


def make_step(
    lengths: Sequence[tuple[int, int]],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    kv_format: KVFormat | None = None,
    num_padding: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> PagedStep:
    """Sequences of (new tokens, context with them), those with one token first.

    The cache's format is `dtype` itself, or `kv_format`.
    Blocks are scattered, tables go on behind what a sequence has with a block of NaN, rows are in
    no order, and what no window reaches is NaN. `num_padding` empty sequences follow the single
    ones, as in a graph.
    """
    rng = torch.Generator().manual_seed(seed)
    single = [pair for pair in lengths if pair[0] == 1] + [(1, 0)] * num_padding
    parts = single + [pair for pair in lengths if pair[0] != 1]
    counts = [-(-context // block_size) for _, context in parts]
    num_blocks = sum(counts) + 2
    blocks = (torch.randperm(num_blocks - 1, generator=rng) + 1).int().split([*counts, 1])
    rows = torch.randperm(len(parts) + 3, generator=rng)[: len(parts)]
    tables = blocks[-1].repeat(2, len(parts) + 3, max(counts) + 2)
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    stored = torch.full((2, *shape), torch.nan)
    positions, slots = [], []
    for (new, context), own, row in zip(parts, blocks[:-1], rows.tolist(), strict=True):
        tables[1, row, : len(own)] = own
        drawn = torch.randn((2, num_kv_heads, context, head_dim), generator=rng)
        position = torch.arange(context)
        block, offset = own[position // block_size].long(), position % block_size
        seen = position >= (context - new + 1 - window if window else 0)
        stored[:, block[seen], :, offset[seen]] = drawn[:, :, seen].permute(2, 0, 1, 3)
        if context:
            positions.append(position[context - new :])
            slots.append((block * block_size + offset)[context - new :])
        else:
            positions.append(torch.zeros(new, dtype=torch.int64))
            slots.append(torch.zeros(new, dtype=torch.int64))
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    num_tokens = sum(new for new, _ in parts)
    wide = torch.full((num_tokens, columns + 16), torch.nan)
    wide[:, :columns] = torch.randn((num_tokens, columns), generator=rng)
    start = torch.tensor([0, *(new for new, _ in parts)]).cumsum(0)
    batch = StepBatch(
        positions=torch.cat(positions).to(device),
        rows=rows.int().to(device),
        query_start=start.int().to(device),
        context_len=torch.tensor([context for _, context in parts]).int().to(device),
        block_tables=tables.to(device),
        slots=torch.cat(slots).repeat(2, 1).to(device),
        num_single=len(single),
        max_query_len=max(new for new, _ in parts),
        max_context_len=max(context for _, context in parts),
    )
    spec = CacheSpec(num_kv_heads=num_kv_heads, head_dim=head_dim, window=window)
    kv_format = kv_format or as_is(dtype)
    codes, scale = kv_format.encode(stored.to(device=device, dtype=dtype))
    cache = LayerCache(spec, 1, block_size, kv_format, *codes.unbind(0))
    if scale is not None:
        cache.key_scale, cache.value_scale = scale.unbind(0)
    return PagedStep(batch, cache, wide.to(device=device, dtype=dtype)[:, :columns], num_heads)
