"""Drive schedulers with random operations, and check everything after each of them.

    python tests/core/scheduling/random_driver.py --operations 100000 --seed 1

Prints operations, blocks leaked, seed, seconds and how often what happened. A failure prints the
world and the operation that it happened in; the same seed does the same again.
"""

import argparse
import random
import resource
import sys
import time
from collections import Counter

from pagedcore.request import RepetitionDetection, SamplingParams
from pagedcore.testing.hash_model import Fault
from pagedcore.testing.scheduler_world import World, WorldConfig

OPERATIONS_PER_WORLD = 500
POOL_SIZES = (8, 9, 10, 11, 12, 13, 14, 16, 24, 40)
ENDLESS = 10**9
MOST_BYTES = 4 << 30


def random_config(rng: random.Random) -> WorldConfig:
    """A world in which prefixes are shared, memory is short and hashes collide."""
    return rng.choice([mixed_world, mixed_world, crowd, windowed_world])(rng)


def mixed_world(rng: random.Random) -> WorldConfig:
    """A bit of everything."""
    num_seqs = rng.choice([1, 2, 3, 4, 4, 6])
    max_model_len = rng.choice([8, 12, 16, 24])
    chunked = rng.random() < 0.8
    budget = max(num_seqs, rng.choice([1, 7, 64, ENDLESS]))
    return WorldConfig(
        num_blocks=rng.choice(POOL_SIZES),
        block_size=rng.choice([1, 2, 2, 3, 4]),
        max_num_seqs=num_seqs,
        budget=budget if chunked else max(budget, max_model_len),
        max_model_len=max_model_len,
        windows=rng.choice([(None,), (None,), (None, 3), (6,)]),
        vocab_size=rng.choice([2, 3]),
        depth=rng.choice([1, 2]),
        prefix_caching=rng.random() < 0.85,
        hash_bytes=rng.choice([None, 1]),
        priorities=rng.random() < 0.3,
        chunked=chunked,
        threshold=rng.choice([0, 0, 0, 3]),
        reserves_all=rng.random() < 0.8,
        watermark=rng.choice([0.0, 0.0, 0.2]),
    )


def crowd(rng: random.Random) -> WorldConfig:
    """Many who grow in a pool that is too small for them: preemption all the time."""
    return WorldConfig(
        num_blocks=rng.randint(12, 16),
        block_size=rng.choice([2, 2, 4]),
        max_num_seqs=6,
        budget=64,
        max_model_len=24,
        depth=rng.choice([1, 2]),
        prefix_caching=rng.random() < 0.7,
        priorities=rng.random() < 0.7,
    )


def windowed_world(rng: random.Random) -> WorldConfig:
    """Layers that forget: blocks come back early, and hits have nothing in front."""
    return WorldConfig(
        num_blocks=rng.randint(20, 40),
        block_size=rng.choice([1, 2]),
        max_num_seqs=4,
        budget=rng.choice([7, 64]),
        max_model_len=24,
        windows=rng.choice(
            [(2,), (4,), (6,), (8,), (None, 3), (None, 5, 2), (5, None), (3, None, 3)]
        ),
        depth=rng.choice([1, 2, 2]),
        prefix_caching=rng.random() < 0.85,
    )


class Driver:
    """One world and the random numbers that move it."""

    def __init__(self, rng: random.Random, config: WorldConfig) -> None:
        self.rng = rng
        self.world = World(config)
        self.fault_rate = rng.choice([0.0, 0.03, 0.15])
        self.most_tokens = rng.choice([(1, 2, 3, 5, 8, 100), (100,)])
        self.operations = [
            (self.advance, rng.choice([60, 60, 200])), (self.add, 12), (self.add_family, 3),
            (self.fork, 6), (self.abort, 5), (self.preempt, 3), (self.add_oversized, 1),
            (self.add_again, 1), (self.reset, 1), (self.evict, 1),
            (self.abort_unknown, 1), (self.change_budget, 1),
        ]  # fmt: skip
        self.weights = [weight for _, weight in self.operations]

    def step(self) -> str:
        """Do something; its name."""
        [(operation, _)] = self.rng.choices(self.operations, self.weights)
        operation()
        return operation.__name__

    def params(self) -> SamplingParams:
        rng = self.rng
        detection = RepetitionDetection(max_pattern_size=2, min_count=3)
        most = rng.choice(self.most_tokens)
        return SamplingParams(
            temperature=rng.choice([0.0, 0.0, 1.0]),
            max_tokens=most,
            min_tokens=min(most, rng.choice([0, 0, 2])),
            seed=rng.choice([None, 7, -3]),
            ignore_eos=rng.random() < 0.3,
            stop_token_ids=rng.choice([(), (), (1,), (*range(5, 14), 1)]),
            logprobs=rng.choice([None, None, 1]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
            skip_reading_prefix_cache=rng.random() < 0.05,
            repetition_detection=rng.choice([None, None, detection]),
        )

    def new_request(self, length: int | None = None):
        rng, world = self.rng, self.world
        if length is None:
            length = min(rng.choice([1, 2, 3, 4, 5, 6, 8, 10, 15, 20]), world.longest - 1)
        family = rng.choice([0, 0, 1])  # many begin alike
        prompt = [family] * (length - 1) + [rng.randrange(2)]
        if rng.random() < 0.3:
            prompt = [rng.randrange(2) for _ in range(length)]
        return world.request(
            prompt,
            params=self.params(),
            eos_token_id=rng.choice([-1, -1, 0, 2]),
            priority=rng.randrange(3) if world.config.priorities else 0,
            cache_salt=rng.choice([None, None, "a"]),
        )

    def add(self) -> None:
        if len(self.world.live) < 12:
            self.world.add(self.new_request())

    def sibling(self, request, params=None):
        other = self.world.request(
            request.prompt_token_ids.tolist(), params=params or self.params(),
            eos_token_id=request.eos_token_id, priority=request.priority,
            cache_salt=request.cache_salt,
        )  # fmt: skip
        other.arrival_time = request.arrival_time
        return other

    def add_family(self) -> None:
        if len(self.world.live) < 12:
            first = self.new_request()
            others = [self.sibling(first) for _ in range(self.rng.randint(1, 4))]
            self.world.add(first, others)

    def fork(self) -> None:
        world = self.world
        if not world.live or len(world.live) >= 12:
            return
        running = [tracked for tracked in world.live.values() if tracked.outputs]
        parent = self.rng.choice(running or list(world.live.values()))
        if self.rng.random() < 0.3:
            parent = self.rng.choice(list(world.live.values()))
        children = [self.sibling(parent.request) for _ in range(self.rng.randint(1, 3))]
        if all(c.params.max_tokens > len(parent.outputs) for c in children):
            world.fork(parent.request.id, children)

    def abort(self) -> None:
        if self.world.live:
            count = self.rng.choice([1, 1, 1, 3])
            ids = list(self.world.live)
            self.world.abort(self.rng.sample(ids, min(count, len(ids))))

    def abort_unknown(self) -> None:
        dead = self.rng.randint(1, self.world.num_requests + 1)
        if dead not in self.world.live:
            self.world.abort([dead])

    def preempt(self) -> None:
        if self.world.live:
            self.world.preempt(self.rng.choice(list(self.world.live)))

    def add_oversized(self) -> None:
        self.world.refuse(self.new_request(self.world.longest + self.rng.choice([0, 1, 50])))

    def add_again(self) -> None:
        if self.world.live:
            request = self.new_request()
            request.id = self.rng.choice(list(self.world.live))
            self.world.refuse(request)

    def reset(self) -> None:
        self.world.reset_prefix_cache()

    def evict(self) -> None:
        self.world.evict_all()

    def change_budget(self) -> None:
        if self.world.config.chunked:
            self.world.set_budget(self.rng.choice([1, 7, 64, ENDLESS]))

    def advance(self) -> None:
        world = self.world
        if world.can_plan and (not world.in_flight or self.rng.random() < 0.7):
            if not world.plan(self.fault) and world.in_flight:
                world.finish()
        else:
            world.finish()

    def fault(self, plan) -> Fault | None:
        rng = self.rng
        if rng.random() >= self.fault_rate:
            return None
        if rng.random() < 0.3:
            return Fault(before_anything=rng.random() < 0.5)
        rows = rng.sample(plan.rows.tolist(), rng.randint(1, min(2, len(plan.rows))))
        return Fault(rows=frozenset(rows))


COUNTED = ("generation_tokens", "num_preemptions", "prefix_cache_hits", "fork_requests",
           "cow_block_copies", "request_success_error", "request_success_abort")  # fmt: skip


def run(operations: int, seed: int) -> Counter[str]:
    """Run that many operations in a row of worlds; what happened, by name."""
    totals: Counter[str] = Counter()
    while totals["operations"] < operations:
        rng = random.Random(f"{seed}/{totals['worlds']}")
        config = random_config(rng)
        last, count = "the start", 0
        try:
            driver = Driver(rng, config)
            while count < min(OPERATIONS_PER_WORLD, operations - totals["operations"]):
                last = driver.step()
                count += 1
            driver.world.drain()
        except BaseException:
            number = totals["operations"] + count + 1
            print(f"seed {seed}, world {totals['worlds']}, operation {number}, after {last}")
            print(config)
            raise
        pool = driver.world.scheduler._pool
        stats = driver.world.scheduler.stats()
        totals.update({name: int(stats[name]) for name in COUNTED})
        totals.update(
            operations=count, worlds=1, steps=driver.world.model.num_launched,
            blocks_leaked=pool.num_blocks - 1 - pool.num_free,
        )  # fmt: skip
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))  # a bug may never end
    started = time.perf_counter()
    totals = run(args.operations, args.seed)
    facts = {**totals, "seed": args.seed, "seconds": round(time.perf_counter() - started, 1)}
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    return 1 if totals["blocks_leaked"] else 0


if __name__ == "__main__":
    sys.exit(main())
