"""Output does not depend on the schedule: it equals that of the unbatched reference.

A world compares every token with the reference, so a world that ends is the proof.
"""

import random
from dataclasses import replace

import pytest

from pagedcore.request import SamplingParams
from pagedcore.testing.scheduler_world import World, WorldConfig

BASE = WorldConfig(num_blocks=64, block_size=4, max_num_seqs=6, budget=64, max_model_len=48)
UNBOUNDED = 10**9


def requests(world, rng, count=12):
    """Prompts that begin alike, greedy and sampled."""
    for _ in range(count):
        prompt = [1, 0, 1, 1, 0, 0] * rng.randint(0, 3) + [rng.randrange(2)]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]), seed=rng.choice([None, 3]), max_tokens=20
        )
        yield world.request(prompt, params=params, cache_salt=rng.choice([None, "a"]))


def run(config, seed=0, *, preempt=0.0, abort=0.0, fork=0.0):
    rng = random.Random(seed)
    world = World(config)
    for request in requests(world, rng):
        world.add(request)
    while world.live or world.in_flight:
        world.advance()
        ids = list(world.live)
        if ids and rng.random() < preempt:
            world.preempt(rng.choice(ids))
        if ids and rng.random() < abort:
            world.abort([rng.choice(ids)])
        if len(ids) in range(1, 9) and rng.random() < fork:
            parent = world.live[rng.choice(ids)]
            child = world.request([0], params=SamplingParams(max_tokens=25, temperature=0.0))
            child.arrival_time = parent.request.arrival_time
            world.fork(parent.request.id, [child])
    world.drain()
    return world


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("budget", [1, 7, 64, UNBOUNDED])
def test_however_prompts_are_cut(budget, depth):
    """SCHED-12, ASYNC-7, EN-38"""
    rows = min(6, budget)
    run(replace(BASE, budget=budget, max_num_seqs=rows, depth=depth))


@pytest.mark.parametrize("caching", [True, False])
def test_with_a_cold_and_a_warm_cache(caching):
    """SCHED-12, EN-38"""
    world = run(replace(BASE, prefix_caching=caching))
    rng = random.Random(0)
    for request in requests(world, rng):
        world.add(request)
    world.drain()
    assert (world.scheduler.stats()["prefix_cache_hits"] > 0) == caching


@pytest.mark.parametrize("depth", [1, 2])
def test_whoever_is_preempted(depth):
    """PRE-2, ASYNC-5"""
    world = run(replace(BASE, depth=depth), preempt=0.3)
    assert world.scheduler.stats()["num_preemptions"] > 10


@pytest.mark.parametrize("num_blocks", [10, 13, 20])
def test_however_small_the_pool_is(num_blocks):
    """SCHED-12"""
    world = run(replace(BASE, num_blocks=num_blocks, max_model_len=32))
    assert world.scheduler.stats()["num_preemptions"] > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_whoever_is_aborted_or_forked(depth):
    """FORK-12, CANCEL-2, ERR-4"""
    world = run(replace(BASE, depth=depth), abort=0.05, fork=0.2)
    assert world.scheduler.stats()["fork_requests"] > 5
    assert world.scheduler.stats()["request_success_abort"] > 0


@pytest.mark.parametrize("size", [1, 2])
def test_however_hashes_collide(size):
    """KV-13, IN-47"""
    world = run(replace(BASE, hash_bytes=size), preempt=0.1)
    assert world.scheduler.stats()["prefix_cache_hits"] > 0


@pytest.mark.parametrize("windows", [(8,), (None, 8), (6, None, 3)])
@pytest.mark.parametrize("depth", [1, 2])
def test_whatever_the_layers_keep(windows, depth):
    """SLOT-6"""
    run(replace(BASE, num_blocks=80, windows=windows, depth=depth), preempt=0.1, fork=0.1)


@pytest.mark.parametrize("block_size", [1, 2, 8, 16])
def test_whatever_the_size_of_blocks(block_size):
    """FORK-4"""
    blocks = 1 + 240 // block_size
    run(replace(BASE, block_size=block_size, num_blocks=blocks), preempt=0.05, fork=0.1)
