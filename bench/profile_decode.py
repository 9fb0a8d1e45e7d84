"""Where the time of a steady decode step goes: a table of kernels, and the device's idle share.

    python bench/profile_decode.py --shape qwen3-0.6b --batch 256 --context 512

Runs without an installation, on one GPU, with random weights.
"""

import argparse
import collections

import numpy as np
import torch
import workspace
from machine import write_result
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pagedcore import EngineConfig, SamplingParams
from pagedcore.request import Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, nargs="+", default=[256])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--out")
    args = parser.parse_args()
    options = workspace.shape_options(
        args.shape, max_model_len=8192, gpu_memory_utilization=0.85, enable_prefix_caching=False
    )
    engine = workspace.build(EngineConfig.from_options(**options))
    results = {}
    for number, batch in enumerate(args.batch):
        results[batch] = run(engine, args, batch, number * 10**6)
    if args.out:
        write_result(args.out, arguments=vars(args), batches=results)


def run(engine, args, batch, first_id):
    rng = np.random.default_rng(0)
    params = SamplingParams(
        temperature=args.temperature, max_tokens=args.steps + 60, ignore_eos=True
    )
    for i in range(batch):
        prompt = rng.integers(0, 100_000, args.context).astype(np.int32)
        engine.add(Request(id=first_id + i, prompt_token_ids=prompt, params=params))
    for _ in range(30 + batch * args.context // 8192):
        engine.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(args.steps):
            engine.step()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == DeviceType.CUDA]
    times, counts = collections.Counter(), collections.Counter()
    for event in events:
        times[event.name] += event.time_range.elapsed_us()
        counts[event.name] += 1
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    busy = sum(times.values())
    print(f"{args.shape} batch {batch} context {args.context}: {span / args.steps:.0f} us a step,")
    print(f"  {busy / args.steps:.0f} us in {len(events) / args.steps:.0f} kernels")
    table = []
    for name, micros in times.most_common(args.rows):
        table.append((name, counts[name] / args.steps, micros / args.steps))
        print(f"{micros / args.steps:9.1f} us {counts[name] / args.steps:6.1f} x  {name[:100]}")
    while engine.has_work:
        engine.step()
    return dict(step_us=span / args.steps, busy_us=busy / args.steps, kernels=table)


if __name__ == "__main__":
    main()
