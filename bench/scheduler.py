"""CPU time of one steady decode step: `plan_step` plus `finish_step`, prefix cache on.

    python bench/scheduler.py [--out bench/results/scheduler.json]

Every row advances by one token per step; prompts have different lengths, so that in each step an
equal share of the rows fills a block, which is hashed, and takes another. Prints a table in
microseconds of the thread's CPU time: the mean over all steps (what throughput pays), the median
and the 99th percentile. `depth` steps are in flight; 2 is asynchronous. Nothing is executed.
"""

import argparse
import statistics
import time
from collections import deque
from pathlib import Path

import numpy as np
from machine import RESULTS, write_result

from pagedcore.cache_spec import CacheGroup, CacheSpec
from pagedcore.config import SchedulerConfig
from pagedcore.request import Request, SamplingParams
from pagedcore.scheduling.policies import FirstComeFirstServed
from pagedcore.scheduling.scheduler import Scheduler
from pagedcore.step import StepResult

ROWS = (1, 32, 256, 1024)
GATE_US = {256: 300, 1024: 1000}
GOAL_US = {256: 60, 1024: 150}
VOCAB_SIZE = 32_000
MAX_MODEL_LEN = 4096


def steady(rows: int, block_size: int, depth: int, max_tokens: int) -> tuple[Scheduler, deque]:
    """A scheduler in which `rows` sequences decode, and its steps in flight."""
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=rows, max_num_batched_tokens=max(8192, rows)),
        num_blocks=1 + rows * (MAX_MODEL_LEN // block_size),
        block_size=block_size,
        groups=[CacheGroup(CacheSpec(num_kv_heads=8, head_dim=128), (0,))],
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=True,
        hash_algorithm="sha256",
        kv_watermark=0.0,
        policy=FirstComeFirstServed(),
        seed=0,
    )
    rng = np.random.default_rng(0)
    for i in range(rows):
        prompt = rng.integers(3, VOCAB_SIZE, 64 + i % block_size, np.int32)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        scheduler.add(Request(id=i, prompt_token_ids=prompt, params=params, eos_token_id=2))
    in_flight: deque = deque([scheduler.plan_step() for _ in range(depth)])
    while in_flight[0].num_single < rows:
        plan = in_flight.popleft()
        tokens = rng.integers(3, VOCAB_SIZE, len(plan.rows), np.int32)
        scheduler.finish_step(plan, StepResult(tokens))
        in_flight.append(scheduler.plan_step())
    return scheduler, in_flight


def measure(rows: int, block_size: int, depth: int, steps: int) -> dict[str, float]:
    """Microseconds per step, over `steps` steps after some to warm up."""
    warm = 2 * block_size
    scheduler, in_flight = steady(rows, block_size, depth, max_tokens=steps + warm + 200)
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, VOCAB_SIZE, (steps + warm, rows), np.int32)
    results = [StepResult(row) for row in tokens]
    times = []
    for result in results:
        plan = in_flight.popleft()
        started = time.thread_time_ns()
        scheduler.finish_step(plan, result)
        following = scheduler.plan_step()
        times.append((time.thread_time_ns() - started) / 1e3)
        assert following is not None
        assert len(following.rows) == rows
        in_flight.append(following)
    times = times[warm:]
    return {
        "mean_us": statistics.fmean(times),
        "median_us": statistics.median(times),
        "p99_us": float(np.percentile(times, 99)),
        "min_us": min(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--repeats", type=int, default=3, help="the best mean counts")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--out", type=Path, help=f"such as {RESULTS / 'scheduler.json'}")
    args = parser.parse_args()
    figures = []
    print(f"{'rows':>5} {'block':>6} {'depth':>6} {'mean':>8} {'median':>8} {'p99':>8}  gate  goal")
    for block_size in args.block_sizes:
        for rows in ROWS:
            for depth in (1, 2):
                runs = [measure(rows, block_size, depth, args.steps) for _ in range(args.repeats)]
                best = min(runs, key=lambda run: run["mean_us"])
                gate, goal = GATE_US.get(rows), GOAL_US.get(rows)
                figures.append(
                    dict(rows=rows, block_size=block_size, depth=depth, **best,
                         gate_us=gate, goal_us=goal, runs=[run["mean_us"] for run in runs])
                )  # fmt: skip
                print(
                    f"{rows:5} {block_size:6} {depth:6} {best['mean_us']:8.1f} "
                    f"{best['median_us']:8.1f} {best['p99_us']:8.1f}  {gate or '-':>4}  "
                    f"{goal or '-':>4}",
                    flush=True,
                )
    if args.out:
        arguments = {name: str(value) for name, value in vars(args).items()}
        write_result(args.out, arguments=arguments, figures=figures)


if __name__ == "__main__":
    main()
