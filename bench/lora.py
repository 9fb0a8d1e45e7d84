"""What adapters (LoRA) cost a decode step: every sequence with one of its own, beside none.

    python bench/lora.py --out bench/results/lora-h200.json
    python bench/lora.py --dry-run

Runs without an installation, on one GPU, with random weights. The first line is an engine without
room for adapters. All adapters have the same random numbers, in memory of their own on the device.
`--dry-run` takes a small shape on the CPU, and says nothing about speed.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import workspace
from machine import write_result

from pagedcore import EngineConfig, SamplingParams
from pagedcore.engine.engine import Engine
from pagedcore.execution.adapter_files import Adapter
from pagedcore.execution.adapter_pool import AdapterMatrices
from pagedcore.request import Request

TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def seconds_per_step(engine: Engine, args: argparse.Namespace, names: list[str | None]) -> float:
    """Median seconds of a step in which each of the batch decodes, with these adapters in turn."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=args.steps + 40, ignore_eos=True)
    for i in range(args.batch):
        prompt = rng.integers(0, 1000, args.context).astype(np.int32)
        name = names[i % len(names)]
        engine.add(Request(id=i, prompt_token_ids=prompt, params=params, adapter=name))
    ended = []
    while engine.has_work:
        output = engine.step()
        if output is not None and len(output.tokens) == args.batch:
            ended.append(time.perf_counter())
    return statistics.median(np.diff(ended[10:]).tolist())


def add_adapters(engine: Engine, args: argparse.Namespace, targets: str) -> tuple[list[str], int]:
    """Names of as many adapters as the batch has sequences, and the bytes of each."""
    store = engine._executor.adapters
    pinned = torch.cuda.is_available()
    matrices = {}
    for name, (inputs, outputs) in store._pool.shapes.items():
        if name.rpartition(".")[2] in TARGETS[targets]:
            pair = [torch.randn(args.rank, inputs), torch.randn(outputs, args.rank)]
            a, b = (t.div_(100).to(store._dtype) for t in pair)
            matrices[name] = AdapterMatrices(
                *((a.pin_memory(), b.pin_memory()) if pinned else (a, b))
            )
    size = sum(2 * (m.a.numel() + m.b.numel()) for m in matrices.values())
    names = [f"{targets}-{i}" for i in range(args.batch)]
    for name in names:
        store.add(name, Adapter(name, args.rank, size, matrices))
    return names, size


def build(args: argparse.Namespace, **options) -> Engine:
    settings = workspace.shape_options(
        args.shape,
        max_model_len=args.context + args.steps + 64,
        max_num_seqs=args.batch,
        enable_prefix_caching=False,
        num_gpu_blocks_override=args.batch * (args.context + args.steps + 200) // 16 + 16,
        **options,
    )
    if args.dry_run:
        path = Path(settings["model"], "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    return workspace.build(EngineConfig.from_options(**settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="a small shape, on the CPU")
    parser.add_argument("--out", help="where to write the result file")
    args = parser.parse_args()
    options = {}
    if args.dry_run:
        args.shape, args.batch, args.context, args.steps, args.repeats = "qwen3-0.6b", 2, 8, 12, 1
        options = {"device": "cpu"}
    figures: dict[str, dict[str, float]] = {}

    def measure(
        label: str, engine: Engine, names: list[str | None], adapter_bytes: int = 0
    ) -> None:
        times = [seconds_per_step(engine, args, names) for _ in range(args.repeats + 1)][1:]
        step = statistics.median(times)
        base = figures["no room"]["step_ms"] / 1e3 if figures else step
        figures[label] = {
            "step_ms": 1e3 * step,
            "tokens_per_second": args.batch / step,
            "of_base": base / step,
            "adapter_mb": adapter_bytes / 1e6,
        }
        print(f"{label:14} {1e3 * step:8.3f} ms a step  {base / step:5.3f} of base", flush=True)

    engine = build(args, **options)
    measure("no room", engine, [None])
    engine.shutdown()
    del engine
    gc.collect()
    torch.cuda.empty_cache()  # the weights were still held when `shutdown` did so
    room = {
        "enable_lora": True,
        "max_loras": args.batch,
        "max_lora_rank": args.rank,
        "max_cpu_loras": 2 * args.batch,
    }
    engine = build(args, **options, **room)
    measure("none", engine, [None])
    for targets in TARGETS:
        names, size = add_adapters(engine, args, targets)
        measure(f"1 {targets}", engine, [names[0]], size)
        measure(f"{args.batch} {targets}", engine, [*names], size)
    engine.shutdown()
    if args.out:
        write_result(args.out, arguments=vars(args), figures=figures)


if __name__ == "__main__":
    main()
