"""Kernels run on the GPU where there is one, and in triton's interpreter elsewhere."""

import os
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which tests do after this

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.ops import LayerCache, StepBatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device():
    return DEVICE


@dataclass
class PagedStep:
    """A step over one layer's cache in the kernels' layout; whatever is not in use holds NaN."""

    batch: StepBatch
    cache: LayerCache
    qkv: torch.Tensor
    num_heads: int


def make_step(
    lengths,
    *,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    block_size=16,
    window=None,
    dtype=torch.float32,
    stride_padding=0,
    num_padding=0,
    cache_dtype=None,
    seed=0,
    device=DEVICE,
):
    """Sequences (new tokens, context with them), those with one token first, on scattered blocks.

    Tables name blocks that others own behind what a sequence has, and every slot outside of the
    sequences' contexts holds NaN. `num_padding` empty sequences follow the single ones.
    """
    rng = torch.Generator(device).manual_seed(seed)
    lengths = sorted(lengths, key=lambda pair: pair[0] != 1)
    num_single = sum(new == 1 for new, _ in lengths)
    lengths[num_single:num_single] = [(1, 0)] * num_padding
    num_single += num_padding
    context = torch.tensor([total for _, total in lengths])
    blocks = (context + block_size - 1) // block_size
    num_rows, width = len(lengths) + 3, int(blocks.max()) + 2
    num_blocks = int(blocks.sum()) + 2
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    tables = torch.full((1, num_rows, width), free.pop(), dtype=torch.int32)
    rows = torch.randperm(num_rows)[: len(lengths)]
    spec = CacheSpec(num_kv_heads=num_kv_heads, head_dim=head_dim, window=window)
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    filled = [torch.full(shape, float("nan"), device=device) for _ in range(2)]
    positions, slots = [], []
    for (new, total), row, count in zip(lengths, rows.tolist(), blocks.tolist(), strict=True):
        own = [free.pop() for _ in range(count)]
        tables[0, row, :count] = torch.tensor(own, dtype=torch.int32)
        for index, block in enumerate(own):
            used = min(total - index * block_size, block_size)
            for store in filled:
                store[block, :, :used] = torch.randn(
                    num_kv_heads, used, head_dim, generator=rng, device=device
                )
        for position in range(total - new, total):
            positions.append(max(position, 0))
            slots.append(
                own[position // block_size] * block_size + position % block_size if own else 0
            )
    key, value = (store.to(cache_dtype or dtype) for store in filled)
    num_tokens, columns = len(positions), (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.full((num_tokens, columns + stride_padding), float("nan"), device=device)
    qkv[:, :columns] = torch.randn(num_tokens, columns, generator=rng, device=device)
    starts = torch.tensor([0] + [new for new, _ in lengths]).cumsum(0)
    batch = StepBatch(
        positions=torch.tensor(positions, device=device),
        rows=rows.int().to(device),
        query_start=starts.int().to(device),
        context_len=context.int().to(device),
        block_tables=tables.to(device),
        slots=torch.tensor([slots], device=device),
        num_single=num_single,
        max_query_len=max(new for new, _ in lengths),
        max_context_len=int(context.max()),
    )
    cache = LayerCache(spec, 0, block_size, key, value)
    return PagedStep(batch, cache, qkv.to(dtype)[:, :columns], num_heads)


@pytest.fixture(scope="session")
def new_step():
    return make_step
