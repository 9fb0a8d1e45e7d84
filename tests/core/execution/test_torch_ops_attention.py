"""Attention in plain torch against a direct computation in float64, through a scattered cache."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution import torch_attention
from pagedcore.execution.kv_formats import Int8, as_is, fp8
from pagedcore.execution.ops import LayerCache
from pagedcore.execution.torch_ops import TorchOps

CPU = torch.device("cpu")


@st.composite
def _histories(draw):
    """For each of some sequences, the lengths of the pieces that it runs in."""
    piece = st.one_of(st.just(1), st.integers(2, 19))
    return draw(st.lists(st.lists(piece, min_size=1, max_size=4), min_size=1, max_size=5))


@settings(max_examples=60, deadline=None)
@given(
    histories=_histories(),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (9, 3), (5, 1)]),
    head_dim=st.sampled_from([2, 6, 16, 33]),
    block_size=st.sampled_from([1, 2, 4, 16]),
    window=st.sampled_from([None, 1, 3, 7, 64]),
    soft_cap=st.sampled_from([None, 0.7, 30.0]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_mix_of_pieces_gives_what_whole_sequences_give(
    new_pool, histories, heads, head_dim, block_size, window, soft_cap, has_sinks, seed
):
    pool = new_pool(
        *heads,
        head_dim,
        block_size=block_size,
        window=window,
        soft_cap=soft_cap,
        has_sinks=has_sinks,
        seed=seed,
    )
    sequences = [pool.sequence(sum(pieces)) for pieces in histories]
    for number in range(max(map(len, histories))):
        runs = [
            (sequence, pieces[number], sum(pieces[: number + 1]))
            for sequence, pieces in zip(sequences, histories, strict=True)
            if number < len(pieces)
        ]
        pool.check(pool.step(runs), tolerance=1e-5)


@pytest.mark.parametrize("window", [None, 5, 300])
def test_tiles_of_a_long_prompt_meet_without_a_seam(new_pool, window):
    pool = new_pool(2, 1, 4, block_size=16, window=window)
    sequence = pool.sequence(2 * torch_attention._TILE + 77)
    pool.check(pool.step([(sequence, 40, 40)]))
    pool.check(pool.step([(sequence, 500, 540)]))
    pool.check(pool.step([(sequence, 1, 541)]))
    pool.check(pool.step([(sequence, 48, 589)]))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_single_sequence_may_lie_in_one_piece_or_in_many(new_pool, ordered):
    pool = new_pool(ordered=ordered, window=20)
    sequence = pool.sequence(50)
    pool.check(pool.step([(sequence, 49, 49)]))
    pool.check(pool.step([(sequence, 1, 50)]))


def test_parts_of_a_large_batch_give_the_same_as_one(new_pool, monkeypatch):
    pool = new_pool()
    sequences = [pool.sequence(length) for length in (3, 50, 4, 4, 31, 1, 9, 60)]
    pool.step([(s, len(s.heads) - 1, len(s.heads) - 1) for s in sequences if len(s.heads) > 2])
    runs = [(s, 1, len(s.heads)) for s in sequences]
    whole = pool.step(runs)
    monkeypatch.setattr(torch_attention, "_PART", 64 * 2 * 2 * 8)

    cut = pool.step(runs)

    pool.check(whole)
    pool.check(cut)


def test_padding_changes_nothing(new_pool):
    pool = new_pool()
    first, second, third = (pool.sequence(length) for length in (9, 1, 13))
    pool.step([(first, 8, 8)])
    pool.check(pool.step([(first, 1, 9), (second, 1, 1), (third, 13, 13)], num_padding=3))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "backend"),
    [
        (torch.bfloat16, 2e-2, "torch"),
        (torch.bfloat16, 2e-2, "native"),
        (torch.float16, 2e-3, "torch"),
    ],
)
def test_small_types_round_only_at_the_end(new_pool, backends, dtype, tolerance, backend):
    if backend not in backends:
        pytest.skip("the kernels in C do not run here")
    pool = new_pool(9, 3, 64, block_size=16, dtype=dtype, ops=backends[backend])
    one, two, three = (pool.sequence(length) for length in (100, 33, 70))
    pool.check(pool.step([(one, 99, 99), (two, 20, 20)]), tolerance)
    pool.check(pool.step([(one, 1, 100), (two, 13, 33), (three, 70, 70)]), tolerance)


@pytest.mark.parametrize("kv_format", [fp8(), Int8()], ids=lambda kv_format: kv_format.name)
def test_a_cache_may_have_a_smaller_type_than_its_queries(kv_format, new_pool):
    pool = new_pool(kv_format=kv_format)
    one, two = pool.sequence(20), pool.sequence(9)
    pool.check(pool.step([(one, 19, 19), (two, 1, 1)]))
    pool.check(pool.step([(one, 1, 20), (two, 8, 9)]))


@pytest.mark.parametrize("kv_format", [None, Int8()], ids=["own type", "int8"])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_nan_of_one_sequence_never_reaches_another(new_pool, soft_cap, kv_format):
    """Reliability R18: not beside it in a step, and not from a block that it has left."""
    pool = new_pool(soft_cap=soft_cap, num_blocks=9, kv_format=kv_format)
    bad, good = pool.sequence(11), pool.sequence(10)
    bad.heads[:] = torch.nan
    results = pool.step([(bad, 10, 10), (good, 9, 9)])
    results += pool.step([(bad, 1, 11), (good, 1, 10)])
    pool.check([result for result in results if result[0] is good])
    assert all(out.isnan().all() for sequence, _, _, out in results if sequence is bad)

    pool.free = [*bad.blocks]
    short, long = pool.sequence(2), pool.sequence(6)
    pool.check(pool.step([(short, 1, 1), (long, 5, 5)]))
    pool.check(pool.step([(short, 1, 2), (long, 1, 6), (good, 1, 10)]))


def test_layers_of_two_groups_keep_their_plans_apart(new_pool):
    """KV-6: a group has its own window and its own table."""
    wide, narrow = new_pool(ordered=True), new_pool(ordered=True, window=3)
    sequence = wide.sequence(12)
    runs = [(sequence, 12, 12)]
    batch = wide.batch(runs, 0)
    other = [b + 100 for b in sequence.blocks]
    table = batch.block_tables.clone()
    table[0, batch.rows[0], :3] = torch.tensor(other).int()
    batch.block_tables = torch.cat([batch.block_tables, table])
    batch.slots = torch.cat([batch.slots, batch.slots + 100 * wide.block_size])
    narrow.cache = replace(narrow.cache, group=1)
    wide.ops.begin_step(batch)

    for pool in (wide, narrow):
        qkv = sequence.heads.flatten(1).clone()
        wide.ops.rope_and_cache(qkv, 4, None, None, pool.cache, batch)
        out = wide.ops.attention(qkv, 4, wide.scale, pool.cache, batch)
        pool.check([(sequence, 12, 12, out.view(12, 4, -1))])


def test_a_copy_takes_the_first_slots_and_leaves_nothing_else(new_pool):
    """FORK-6; what the destination held before may be NaN of a sequence that is gone."""
    pool = new_pool()
    pool.cache.key[1] = torch.randn(4, 4, 8)
    pool.cache.key[2] = torch.nan
    pool.cache.key[3] = torch.nan

    pool.ops.copy_blocks(pool.cache, torch.tensor([[1, 2, 3], [1, 3, 4]], dtype=torch.int32))

    assert torch.equal(pool.cache.key[2, :3], pool.cache.key[1, :3])
    assert not pool.cache.key[2, 3:].any()
    assert torch.equal(pool.cache.key[3], pool.cache.key[1])


def test_a_cache_takes_the_bytes_that_its_spec_says():
    """MEM-5."""
    ops, spec = TorchOps("cpu"), CacheSpec(num_kv_heads=3, head_dim=10)
    for kv_format in (as_is(torch.bfloat16), fp8(), Int8()):
        cache = ops.new_cache(spec, 1, 7, 16, kv_format, CPU)
        assert isinstance(cache, LayerCache)
        stored = [cache.key] if cache.key_scale is None else [cache.key, cache.key_scale]
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in stored)
        assert num_bytes == 7 * spec.bytes_per_block(16, kv_format.vector_bytes)
        assert math.prod(cache.value.shape) * 2 == math.prod(cache.key.shape)
