"""The offline workloads of `workloads.py` on one GPU, with random weights: tokens per second.

    python bench/h200.py --shapes qwen3-0.6b llama-3.1-8b --workloads nano b1 b32 b256 prefill \\
        --out bench/results/h200.json

Runs without an installation. Every workload runs `--repeats` times after a warm-up; the median is
reported, and the number of tokens that came out is checked against the workload's. `burst` is 1,024
requests of 128 in and 256 out at once; `prefix` is the time to the first token of 4,096 cached
tokens and 64 new ones, and of as many cold ones.
"""

import argparse
import json
import statistics
import time

IMPORT_STARTED = time.perf_counter()

import numpy as np
import torch
import workloads
import workspace
from machine import write_result
from model_shapes import SHAPES

from pagedcore import EngineConfig, SamplingParams
from pagedcore.engine.engine import Engine
from pagedcore.request import Request

IMPORT_SECONDS = time.perf_counter() - IMPORT_STARTED

PEER = {  # vLLM 0.26.0 on one H200, tokens per second (prefill: of the prompts)
    "qwen3-0.6b": dict(nano=23951, b1=564, b32=11951, b256=44788, prefill=343215, burst=23418),
    "llama-3.1-8b": dict(nano=10115, b1=201.3, b32=5403, b256=17798, prefill=40685, burst=18728),
    "llama-3.1-8b-w4": {},
    "llama-3.1-8b-fp8-block": {},
    "llama-3.1-8b-fp8": dict(nano=12547, b1=285.6, b32=6691, b256=23742, prefill=62594),
    "qwen3-30b-a3b": dict(nano=5962, b1=238.5, b32=1540, b256=10885, prefill=63886),
    "gemma-2-9b": {},  # not measured yet
    "gpt-oss-20b": {},
    "gpt-oss-20b-mxfp4": {},
    "qwen3-30b-a3b-w4": {},
    "qwen3-30b-a3b-fp8-block": {},
    "deepseek-v2-lite": {},
}


def requests(name: str) -> workloads.Workload:
    if name == "nano":
        return workloads.nano()
    if name == "prefill":
        return workloads.prefill()
    if name == "burst":
        return workloads.decode(1024)
    return workloads.decode(int(name.removeprefix("b")))


def run(engine: Engine, work: workloads.Workload, first_id: int) -> tuple[float, int]:
    """Seconds and output tokens of all requests, given at once."""
    for i, (prompt, max_tokens, temperature) in enumerate(work):
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
        ids = np.asarray(prompt, np.int32)
        engine.add(Request(id=first_id + i, prompt_token_ids=ids, params=params))
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    started = time.perf_counter()
    tokens = 0
    while engine.has_work:
        output = engine.step()
        if output is not None:
            tokens += len(output.tokens)
    return time.perf_counter() - started, tokens


def first_token_seconds(engine: Engine, repeats: int) -> dict[str, float]:
    """Medians over prompts of 4,096 + 64 tokens, with the first part cached and without."""
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"cold": [], "cached": []}
    for i in range(2 + 5 * repeats):  # the first two warm up
        shared = rng.integers(0, 100_000, 4096)
        for kind in seconds:
            prompt = np.concatenate((shared, rng.integers(0, 100_000, 64))).astype(np.int32)
            took, _ = run(engine, [(prompt.tolist(), 1, 0.0)], 10**6 + 2 * i + (kind == "cold"))
            seconds[kind] += [took] * (i >= 2)
    return {kind: statistics.median(samples) for kind, samples in seconds.items()}


def clipped(work: workloads.Workload, tokens: int) -> workloads.Workload:
    return [(prompt, min(n, tokens), temperature) for prompt, n, temperature in work]


def bench(args: argparse.Namespace, shape: str, names: list[str]) -> dict[str, object]:
    options = workspace.shape_options(
        shape,
        max_model_len=args.max_model_len,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=args.prefix_caching or names == ["prefix"],
        **json.loads(args.options),
    )
    engine = workspace.build(EngineConfig.from_options(**options))
    print(shape, json.dumps(engine.info.startup_seconds), engine.info.num_blocks, flush=True)
    figures: dict[str, object] = {"startup_seconds": engine.info.startup_seconds}
    next_id = 0
    for name in names:
        if name == "prefix":
            figures[name] = first_token_seconds(engine, args.repeats)
            print(f"{shape:18} {name:8} {json.dumps(figures[name])}", flush=True)
            continue
        work = requests(name)[: args.max_requests]
        if args.max_tokens:
            work = clipped(work, args.max_tokens)
        for warm in [] if args.max_tokens else [clipped(work, 8), work]:
            run(engine, warm, next_id)
            next_id += len(warm)
        samples = []
        for _ in range(args.repeats):
            seconds, tokens = run(engine, work, next_id)
            next_id += len(work)
            wanted = workloads.totals(work)
            assert tokens == wanted[1], f"{name}: {tokens} tokens came out, not {wanted[1]}"
            samples.append(wanted[0 if name == "prefill" else 1] / seconds)
        rate = statistics.median(samples)
        peer = PEER[shape].get(name)
        figures[name] = {"tokens_per_second": rate, "samples": samples, "peer": peer}
        ratio = f"{rate / peer:5.2f} x peer {peer:,}" if peer else ""
        print(f"{shape:18} {name:8} {rate:12,.1f} tok/s  {ratio}", flush=True)
    engine.shutdown()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6b"], choices=list(PEER))
    parser.add_argument("--workloads", nargs="+", default=["nano", "b1", "b32", "b256", "prefill"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-requests", type=int, help="cut workloads, for a dry run")
    parser.add_argument("--max-tokens", type=int, help="cut outputs, for a dry run")
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--options", default="{}", help="more engine settings, as JSON")
    parser.add_argument("--out", help="where to write the result file")
    args = parser.parse_args()
    figures = {shape: bench(args, shape, args.workloads) for shape in args.shapes}
    if args.out:
        write_result(args.out, arguments=vars(args), import_seconds=IMPORT_SECONDS, shapes=figures)


if __name__ == "__main__":
    assert set(PEER) >= set(SHAPES)
    main()
