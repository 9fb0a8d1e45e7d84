"""What is written to the cache: norms and rotations against the plain operation, and copies."""

from dataclasses import replace

import pytest
import torch

from pagedcore.execution.kv_formats import Int8, fp8
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
    step = make_step([(1, 7), (20, 41)], kv_format=fp8(), device=device)
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
    step = make_step([(1, 7), (20, 41)], kv_format=fp8(), device="cuda")
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


def poisoned(cache):
    """An int8 cache whose numbers are all NaN."""
    return replace(
        cache,
        key=torch.full_like(cache.key, 99),
        value=torch.full_like(cache.value, 99),
        key_scale=torch.full_like(cache.key_scale, torch.nan),
        value_scale=torch.full_like(cache.value_scale, torch.nan),
    )


def slots_of(step, cache):
    """What an int8 cache has in the step's slots: codes [2, T, K, D] and scales [2, T, K]."""
    block, offset = step.batch.slots[1] // cache.block_size, step.batch.slots[1] % cache.block_size
    codes, scales = (cache.key, cache.value), (cache.key_scale, cache.value_scale)
    return (torch.stack([part[block, :, offset] for part in parts]) for parts in (codes, scales))


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    ("head_dim", "rotated", "interleaved"), [(64, 64, False), (80, 32, True), (96, 0, False)]
)
def test_whole_numbers_have_a_scale_for_each_token_and_head(
    head_dim, rotated, interleaved, dtype, device
):
    step = make_step(
        [(1, 7), (1, 3), (20, 41)], num_heads=6, num_kv_heads=3, head_dim=head_dim, dtype=dtype,
        kv_format=Int8(), device=device,
    )  # fmt: skip
    step.qkv.mul_(torch.linspace(0.01, 30, len(step.qkv), device=device)[:, None])
    angles = torch.randn(128, rotated, device=device)
    rope = RopeTable(angles, interleaved) if rotated else None
    for ops in (TritonOps(device), PlainOps(device)):
        qkv, cache = step.qkv.clone(), poisoned(step.cache)
        ops.rope_and_cache(qkv, step.num_heads, rope, None, cache, step.batch)
        codes, scales = slots_of(step, cache)
        want = qkv.reshape(len(qkv), -1, head_dim)[:, 6:].double()
        want = torch.stack(want.split(3, 1))
        torch.testing.assert_close(
            scales.double(), want.abs().amax(-1) / 127, atol=0, rtol=LIMITS[dtype]
        )
        error = (codes.double() * scales[..., None] - want).abs() / scales[..., None]
        assert error.max() <= (0.501 if dtype == torch.float32 else 0.6)  # keys are rounded, too
        assert (codes.abs().amax(-1) == 127).all()
        num_written = codes.numel() // head_dim
        assert cache.key_scale.isfinite().sum() + cache.value_scale.isfinite().sum() == num_written
        assert ((cache.key != 99).any(-1).sum() + (cache.value != 99).any(-1).sum()) == num_written


def test_whole_numbers_keep_zeros_and_show_what_is_not_finite(device):
    step = make_step([(1, 7), (20, 41)], kv_format=Int8(), device=device)
    heads = step.qkv.unflatten(1, (-1, 64))
    heads[2, -1] = 0
    heads[3, -1, 5] = torch.nan
    heads[4, -1, 6] = -torch.inf
    results = []
    for ops in (TritonOps(device), PlainOps(device)):
        cache = poisoned(step.cache)
        ops.rope_and_cache(step.qkv.clone(), step.num_heads, None, None, cache, step.batch)
        codes, scales = slots_of(step, cache)
        results.append(codes.float() * scales[..., None])
    torch.testing.assert_close(*results, equal_nan=True)
    kept = results[0][1, :, -1]
    assert (kept[2] == 0).all()
    assert kept[3:5].isnan().all()
    assert results[0].isnan().sum() == 2 * 64


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
@pytest.mark.parametrize("kv_format", [None, Int8()], ids=["own type", "int8"])
def test_copies_move_the_first_slots_of_blocks_and_no_more(kv_format, block_size, device):
    step = make_step(
        [(1, 300)], num_kv_heads=3, num_heads=3, block_size=block_size, kv_format=kv_format,
        device=device,
    )  # fmt: skip
    caches = []
    stored = ["key", "value"] if kv_format is None else ["key", "value", "key_scale", "value_scale"]
    copies = torch.tensor([[1, 3, 5], [2, 4, block_size], [2, 5, 0]], dtype=torch.int32)
    for ops in (TritonOps(device), PlainOps(device)):
        parts = {name: getattr(step.cache, name) for name in stored}
        cache = replace(step.cache, **{name: part.clone() for name, part in parts.items()})
        ops.copy_blocks(cache, copies.to(device))
        caches.append(cache)
    for name in stored:
        got, want, old = (getattr(cache, name).nan_to_num(7) for cache in (*caches, step.cache))
        assert torch.equal(got, want)
        assert not torch.equal(got, old)


def test_no_copies_are_no_work(device):
    cache = make_step([(1, 3)], device=device).cache
    TritonOps(device).copy_blocks(cache, torch.empty((0, 3), dtype=torch.int32, device=device))
