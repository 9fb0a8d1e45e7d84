"""What is written to the cache: norms and rotations against the plain operation, and copies."""

from dataclasses import replace

import pytest
import torch

from pagedcore.execution.ops import QKNorm, RopeTable
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.steps import make_step
from pagedcore_kernels.fallback import PlainOps

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3}


def empty_like(cache):
    return replace(
        cache, key=torch.full_like(cache.key, 9.0), value=torch.full_like(cache.value, 9.0)
    )


def assert_near(got, want, dtype):
    assert (got.double() - want.double()).norm() <= LIMITS[dtype] * want.double().norm()


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    ("head_dim", "rotated", "interleaved"),
    [(64, 64, False), (64, 64, True), (80, 80, False), (80, 32, False), (96, 24, True), (64, 0, 0)],
)
@pytest.mark.parametrize("has_norm", [True, False])
def test_queries_and_keys_turn_and_keys_and_values_are_kept(
    head_dim, rotated, interleaved, has_norm, dtype, device
):
    step = make_step(
        [(1, 70), (1, 3), (20, 41)],
        num_heads=6,
        num_kv_heads=2,
        head_dim=head_dim,
        dtype=dtype,
        num_padding=2,
        device=device,
    )
    rng = torch.Generator(device).manual_seed(0)
    angles = torch.randn(128, rotated, generator=rng, device=device)
    weights = torch.rand(2, head_dim, generator=rng, device=device).to(dtype) + 0.5
    rope = RopeTable(angles, bool(interleaved)) if rotated else None
    norm = QKNorm(weights[0], weights[1], 1e-5) if has_norm else None
    results = []
    for ops in (TritonOps(device), PlainOps(device)):
        cache, qkv = empty_like(step.cache), step.qkv.clone()
        ops.rope_and_cache(qkv, step.num_heads, rope, norm, cache, step.batch)
        cache.key[0], cache.value[0] = 0, 0  # the null block, where padding goes
        results.append((qkv[[0, 1, *range(4, 24)]], cache.key, cache.value))
    for got, want in zip(*results, strict=True):
        assert_near(got, want, dtype)


def test_eight_bits_hold_what_they_can_and_stop_at_their_limit(device):
    step = make_step([(1, 7), (20, 41)], cache_dtype=torch.float8_e4m3fn, device=device)
    kept = (step.qkv * 40).to(torch.float8_e4m3fn)  # the interpreter does not round as a GPU does
    step.qkv.copy_(kept.float())
    step.qkv[2, -256:-192], step.qkv[2, -192:-128] = 1000, -1000
    results = []
    for ops in (TritonOps(device), PlainOps(device)):
        cache = replace(
            step.cache, key=torch.zeros_like(step.cache.key), value=torch.zeros_like(step.cache.key)
        )
        ops.rope_and_cache(step.qkv.clone(), step.num_heads, None, None, cache, step.batch)
        results.append((cache.key.float(), cache.value.float()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert (results[0][0] == 448).sum() == (results[0][0] == -448).sum() == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_eight_bits_round_to_the_nearest_and_keep_nan():
    step = make_step([(1, 7), (20, 41)], cache_dtype=torch.float8_e4m3fn, device="cuda")
    step.qkv.mul_(200)
    step.qkv[3, -64:] = torch.nan
    results = []
    for ops in (TritonOps("cuda"), PlainOps("cuda")):
        cache = replace(
            step.cache, key=torch.zeros_like(step.cache.key), value=torch.zeros_like(step.cache.key)
        )
        ops.rope_and_cache(step.qkv.clone(), step.num_heads, None, None, cache, step.batch)
        results.append((cache.key.float(), cache.value.float()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert results[0][1].isnan().sum() == 64


def test_strided_rows_keep_what_lies_beside_them(device):
    step = make_step([(1, 7), (3, 9)], device=device)
    wide = torch.full((4, step.qkv.shape[1] + 32), 5.0, device=device)
    qkv = wide[:, 16:-16]
    qkv.copy_(step.qkv)
    rope = RopeTable(torch.randn(16, 64, device=device))
    TritonOps(device).rope_and_cache(
        qkv, step.num_heads, rope, None, empty_like(step.cache), step.batch
    )
    assert (wide[:, :16] == 5).all()
    assert (wide[:, -16:] == 5).all()


@pytest.mark.parametrize("block_size", [16, 64])
def test_copies_move_the_first_slots_of_blocks_and_no_more(block_size, device):
    step = make_step([(1, 300)], num_kv_heads=3, num_heads=3, block_size=block_size, device=device)
    caches = []
    copies = torch.tensor([[1, 3, 5], [2, 4, block_size], [2, 5, 0]], dtype=torch.int32)
    for ops in (TritonOps(device), PlainOps(device)):
        cache = replace(step.cache, key=step.cache.key.clone(), value=step.cache.value.clone())
        ops.copy_blocks(cache, copies.to(device))
        caches.append(cache)
    for got, want in zip(*((cache.key, cache.value) for cache in caches), strict=True):
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    assert not torch.equal(caches[0].key.nan_to_num(7), step.cache.key.nan_to_num(7))


def test_no_copies_are_no_work(device):
    cache = make_step([(1, 3)], device=device).cache
    TritonOps(device).copy_blocks(cache, torch.empty((0, 3), dtype=torch.int32, device=device))
