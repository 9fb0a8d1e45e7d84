"""Attention over a paged cache against the plain operation, on steps of every kind."""

from dataclasses import replace

import pytest
import torch

from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.fallback import PlainOps

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def attend(ops, step, scale, soft_cap):
    ops.begin_step(step.batch)
    return ops.attention(step.qkv, step.num_heads, scale, step.cache, step.batch, soft_cap)


def relative_error(step, device, soft_cap=None):
    """Of the kernel to the plain operation in float32, over all outputs; both with NaN around."""
    scale = step.qkv.shape[1] ** -0.5 * 2
    got = attend(TritonOps(device), step, scale, soft_cap)
    assert got.dtype == step.qkv.dtype
    assert got.is_contiguous()
    cache = replace(step.cache, key=step.cache.key.float(), value=step.cache.value.float())
    exact = replace(step, qkv=step.qkv.float(), cache=cache)
    want = attend(PlainOps(device), exact, scale, soft_cap)
    return ((got.float() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (8, 2), (8, 1)])
def test_single_tokens_attend_to_all_that_came_before(heads, new_step, device):
    step = new_step([(1, 1), (1, 16), (1, 17), (1, 130)], num_heads=heads[0], num_kv_heads=heads[1])
    assert relative_error(step, device) < TOLERANCE[step.qkv.dtype]


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (8, 2), (8, 1)])
def test_several_tokens_attend_to_what_came_before_each(heads, new_step, device):
    step = new_step(
        [(5, 5), (2, 40), (70, 70), (33, 131)], num_heads=heads[0], num_kv_heads=heads[1]
    )
    assert relative_error(step, device) < TOLERANCE[step.qkv.dtype]
