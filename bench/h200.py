"""The offline workloads of `workloads.py` on one GPU, with random weights: tokens per second.

    python bench/h200.py --shapes qwen3-0.6b llama-3.1-8b --workloads nano b1 b32 b256 prefill \\
        --out bench/results/h200.json

Runs without an installation: the members' folders are put on the path here and the plugins are
registered by hand. Every workload runs `--repeats` times after a warm-up; the median is reported,
and the number of tokens that came out is checked against the workload's.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
for folder in (".", "kernels", "plugins/models", "plugins/quantization"):
    sys.path.insert(0, str(ROOT / folder))
sys.path.insert(0, str(ROOT / "bench"))
IMPORT_STARTED = time.perf_counter()

import numpy as np  # noqa: E402 - the path comes first
import pluggy  # noqa: E402
import torch  # noqa: E402
import workloads  # noqa: E402
from machine import write_result  # noqa: E402
from model_shapes import SHAPES, write  # noqa: E402

from pagedcore import EngineConfig, SamplingParams  # noqa: E402
from pagedcore.engine.build import build_engine  # noqa: E402
from pagedcore.engine.engine import Engine  # noqa: E402
from pagedcore.plugins import register  # noqa: E402
from pagedcore.request import Request  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - IMPORT_STARTED

PEER = {  # vLLM 0.26.0 on one H200, tokens per second (prefill: of the prompts)
    "qwen3-0.6b": dict(nano=23951, b1=564, b32=11951, b256=44788, prefill=343215, burst=23418),
    "llama-3.1-8b": dict(nano=10115, b1=201.3, b32=5403, b256=17798, prefill=40685, burst=18728),
    "llama-3.1-8b-fp8": dict(nano=12547, b1=285.6, b32=6691, b256=23742, prefill=62594),
    "qwen3-30b-a3b": dict(nano=5962, b1=238.5, b32=1540, b256=10885, prefill=63886),
}


def plugins() -> pluggy.PluginManager:
    """The workspace's own plugins, without entry points."""
    import pagedcore.builtin
    import pagedcore_kernels
    import pagedcore_models
    import pagedcore_quantization

    modules = {
        "core": pagedcore.builtin,
        "kernels": pagedcore_kernels,
        "models": pagedcore_models,
        "quantization": pagedcore_quantization,
    }
    return register(modules)


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


def clipped(work: workloads.Workload, tokens: int) -> workloads.Workload:
    return [(prompt, min(n, tokens), temperature) for prompt, n, temperature in work]


def bench(args: argparse.Namespace, shape: str, names: list[str]) -> dict[str, object]:
    folder = tempfile.mkdtemp()
    write(folder)
    options = dict(
        model=str(Path(folder, shape.removesuffix("-fp8"))),
        load_format="dummy",
        max_model_len=args.max_model_len,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=args.prefix_caching,
        **json.loads(args.options),
    )
    if shape.endswith("-fp8"):
        options["quantization"] = "fp8"
    engine = build_engine(EngineConfig.from_options(**options), plugins=plugins())
    print(shape, json.dumps(engine.info.startup_seconds), engine.info.num_blocks, flush=True)
    figures: dict[str, object] = {"startup_seconds": engine.info.startup_seconds}
    next_id = 0
    for name in names:
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
