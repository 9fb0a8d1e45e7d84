"""Latent attention over a paged cache against plain torch in float64, and what writes the cache."""

from dataclasses import dataclass, replace

import pytest
import torch

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.kv_formats import as_is, fp8
from pagedcore.execution.ops import LayerCache, RopeTable, StepBatch
from pagedcore.execution.torch_ops import TorchOps
from pagedcore_kernels import latent_ops
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.steps import make_step
from pagedcore_kernels.extend_plan import ExtendConfig, build_tile_list
from pagedcore_kernels.fallback import PlainOps
from pagedcore_kernels.latent_decode import choose_latent_decode, heads_together
from pagedcore_kernels.latent_extend import choose_latent_extend, latent_extend

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
SCALE = 0.2
SINGLE = [(1, 1), (1, 17), (1, 130)]
LONGER = [(5, 5), (2, 40), (17, 30)]


@dataclass
class LatentStep:
    batch: StepBatch
    cache: LayerCache
    query: torch.Tensor
    num_values: int


def make_latent_step(
    lengths, *, num_heads=4, num_values=32, turned=16, dtype=torch.float32, device="cpu", **options
):
    """A step over latent vectors, with NaN wherever nobody may look."""
    size = num_values + turned
    step = make_step(
        lengths, num_heads=num_heads, num_kv_heads=1, head_dim=size, dtype=dtype, device=device,
        **options,
    )  # fmt: skip
    spec = CacheSpec(num_kv_heads=1, head_dim=size, latent=True)
    cache = replace(step.cache, spec=spec, value=step.cache.key)
    heads = step.qkv.reshape(len(step.qkv), -1, size)[:, :num_heads].contiguous()
    return LatentStep(step.batch, cache, heads, num_values)


def reference(step):
    """Float64, one token at a time."""
    batch, cache = step.batch, step.cache
    size = cache.block_size
    queries, vectors = step.query.double().cpu(), cache.key.double().cpu()
    out = torch.zeros(*queries.shape[:2], step.num_values, dtype=torch.float64)
    starts = batch.query_start.tolist()
    for i, (context, row) in enumerate(
        zip(batch.context_len.tolist(), batch.rows.tolist(), strict=True)
    ):
        table = batch.block_tables[cache.group, row].cpu()
        for t in range(starts[i], starts[i + 1]):
            seen = torch.arange(context - (starts[i + 1] - t) + 1)
            if len(seen):
                keys = vectors[table[seen // size].long(), 0, seen % size]
                weights = (queries[t] @ keys.T * SCALE).softmax(-1)
                out[t] = weights @ keys[:, : step.num_values]
    return out


def attend(ops, step):
    ops.begin_step(step.batch)
    return ops.latent_attention(step.query, step.num_values, SCALE, step.cache, step.batch)


def assert_right(step, make_ops=TritonOps):
    got = attend(make_ops(str(step.query.device)), step)
    assert got.dtype == step.query.dtype
    assert got.is_contiguous()
    want = reference(step)
    assert (got.double().cpu() - want).norm() / want.norm() < LIMITS[step.query.dtype]


@pytest.mark.parametrize("num_heads", [1, 6, 80])
def test_all_heads_see_the_same_vectors(num_heads, device):
    lengths = [(1, 1), (1, 70), (5, 5), (2, 40)]
    assert_right(make_latent_step(lengths, num_heads=num_heads, device=device))


@pytest.mark.parametrize(("num_values", "turned"), [(24, 8), (512, 64)])
def test_vectors_of_any_size_fit(num_values, turned, device):
    lengths = [(1, 1), (1, 40), (3, 20)]
    step = make_latent_step(
        lengths, num_values=num_values, turned=turned, dtype=torch.float16, device=device
    )
    assert_right(step)


@pytest.mark.parametrize("block_size", [8, 64])
def test_blocks_may_be_smaller_or_larger_than_a_tile(block_size, device):
    lengths = [(1, 1), (1, 128), (1, 140), (7, 145), (20, 20)]
    assert_right(make_latent_step(lengths, block_size=block_size, device=device))


def test_padding_gives_zeros_and_disturbs_nobody(device):
    step = make_latent_step([(1, 30), (1, 70)], num_padding=3, device=device)
    assert_right(step)
    assert (attend(TritonOps(device), step)[2:] == 0).all()


def test_one_long_sequence_beside_many_short_ones_is_cut_and_merged(device):
    assert_right(make_latent_step([(1, 500)] + [(1, n) for n in range(1, 9)], device=device))


def test_vectors_may_be_kept_in_eight_bits(device):
    step = make_latent_step(SINGLE + LONGER, dtype=torch.float16, kv_format=fp8(), device=device)
    assert_right(step)
    assert_right(step, PlainOps)


@pytest.mark.parametrize(("parts", "keys", "queries"), [(1, 16, 16), (3, 32, 64)])
def test_positions_may_be_cut_in_parts(parts, keys, queries, device):
    lengths = [(1, 3), (1, 70), (6, 200), (2, 3), (9, 110)]
    step = make_latent_step(lengths, num_heads=6, block_size=16, device=device)
    batch, singles = step.batch, step.batch.num_single
    out = torch.full((*step.query.shape[:2], step.num_values), torch.nan, device=device)
    tiles = build_tile_list(
        batch.query_start[singles:], len(out) - singles, queries // heads_together(6, queries)
    )
    latent_extend(
        step.query, SCALE, step.cache.key, batch.block_tables[step.cache.group],
        batch.query_start[singles:], batch.rows[singles:], batch.context_len[singles:], tiles, out,
        first_token=singles, parts=parts, config=ExtendConfig(queries, keys, 4, 2),
    )  # fmt: skip
    want = reference(step)
    assert out[:singles].isnan().all()
    error = out[singles:].double().cpu() - want[singles:]
    assert error.norm() / want[singles:].norm() < 1e-5


def test_plain_torch_stands_in_for_the_kernels(device):
    assert_right(make_latent_step(SINGLE + LONGER, device=device), PlainOps)
    assert_right(make_latent_step(SINGLE, num_padding=2, device=device), PlainOps)


def test_a_step_without_its_kernel_is_right_and_ends_graphs(device, monkeypatch):
    step, ops = make_latent_step(SINGLE + LONGER, device=device), TritonOps(device)
    ops.supports_graphs = True

    def broken(*args, **kwargs):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(latent_ops, "latent_decode", broken)
    want = reference(step)
    assert (attend(ops, step).double().cpu() - want).norm() / want.norm() < 1e-5
    assert not ops.supports_graphs


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_values", "turned"), [(3, 24, 6), (40, 64, 16)])
def test_vectors_are_normed_turned_and_written(
    num_heads, num_values, turned, dtype, interleaved, device
):
    """By strided inputs, as they come out of a product of several parts."""
    size = num_values + turned
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=rng).to(device=device, dtype=dtype)

    step = make_latent_step(
        [(1, 70), (1, 3), (40, 100)], num_heads=num_heads, num_values=num_values, turned=turned,
        block_size=16, dtype=dtype, device=device,
    )  # fmt: skip
    num_tokens = len(step.query)
    wide, latent = draw(num_tokens, num_heads, 20 + turned), draw(num_tokens, size + 8)[:, :size]
    weight = draw(num_values)
    rope = RopeTable(draw(128, turned).float(), interleaved)
    results = []
    for ops in (TritonOps(device), PlainOps(device)):
        ops.begin_step(step.batch)
        key = torch.zeros_like(step.cache.key)
        cache = replace(step.cache, key=key, value=key)
        query = torch.zeros_like(step.query)
        ops.latent_to_cache(query, wide[..., 20:], latent, rope, weight, 1e-6, cache, step.batch)
        results.append((query, key))
    plain = TorchOps(device)
    cache = plain.new_cache(step.cache.spec, 1, len(key), 16, as_is(dtype), torch.device(device))
    query = torch.zeros_like(step.query)
    plain.begin_step(step.batch)
    plain.latent_to_cache(query, wide[..., 20:], latent, rope, weight, 1e-6, cache, step.batch)
    results.append((query, cache.key.transpose(1, 2)))
    for got in results[:2]:
        for a, b in zip(got, results[2], strict=True):
            torch.testing.assert_close(a, b, atol=2 * LIMITS[dtype], rtol=2 * LIMITS[dtype])


def test_the_tiles_of_deepseek_fit_two_generations_of_gpus():
    for shared_memory in (166_912, 232_448):
        for num_heads in (16, 128):
            decode = choose_latent_decode(576, torch.bfloat16, num_heads, 64, shared_memory)
            assert decode.tile >= 32
            assert decode.num_stages >= 2
        extend = choose_latent_extend(576, torch.bfloat16, 64, shared_memory)
        assert extend.queries == 64
