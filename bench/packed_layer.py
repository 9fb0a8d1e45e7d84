"""Whole decoder layers of Llama-3.1-8B with weights of 4 bits: which plans suit each other.

    python bench/packed_layer.py --save     # and keep the plans, as `bench kernels --tune packed`
    TRITON_INTERPRET=1 python bench/packed_layer.py --dry-run    # on a CPU, with tiny shapes

A product that follows a small kernel may ask for its weight while that one runs, and one that
follows a large product had better not: so plans are tried where they run, in a CUDA graph of
several layers with weights of their own. Each product in turn takes the plan with which a layer is
fastest.
"""

import argparse
import concurrent.futures
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

import torch
from machine import write_result
from packed_linear import DEVICE, FORMATS, SHAPES, grouped

from pagedcore.execution.ops import RopeTable
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.clock import time_calls
from pagedcore_kernels.bench.steps import make_step
from pagedcore_kernels.packed_layout import Packed, pack
from pagedcore_kernels.packed_linear import linear
from pagedcore_kernels.packed_plans import PackedPlan, best_quarter, choose_plan
from pagedcore_kernels.small_linear import Scratch
from pagedcore_kernels.tuned_plans import case_of, plans_file, save_plans

Plans = dict[str, PackedPlan]
RIVALS = {
    8: {
        "qkv": [(64, 4, 4, 4, 4), (128, 1, 8, 4, 4), (64, 4, 1, 4, 4), (16, 16, 1, 8, 2)],
        "o": [(32, 4, 1, 4, 6), (16, 16, 1, 8, 2), (32, 16, 1, 8, 2), (64, 4, 2, 4, 4)],
        "gate_up": [(128, 1, 4, 4, 5), (128, 1, 2, 4, 4), (128, 1, 2, 4, 6), (64, 4, 1, 4, 4)],
        "down": [(32, 4, 1, 4, 6), (64, 4, 2, 4, 4), (64, 1, 8, 4, 5), (128, 1, 8, 4, 4)],
    },
    16: {
        "qkv": [(128, 1, 4, 4, 4), (128, 1, 2, 4, 6), (64, 4, 1, 4, 4), (64, 1, 2, 4, 4)],
        "o": [(128, 1, 8, 4, 4), (32, 4, 1, 4, 5), (64, 4, 4, 4, 4), (64, 1, 4, 4, 4)],
        "gate_up": [(128, 1, 2, 4, 4), (128, 1, 4, 4, 5), (128, 1, 1, 4, 4), (64, 1, 1, 4, 4)],
        "down": [(128, 1, 8, 4, 4), (64, 4, 2, 4, 4), (64, 1, 4, 4, 4), (128, 1, 4, 4, 4)],
    },
    64: {
        "qkv": [(64, 1, 1, 4, 4), (64, 1, 2, 4, 4), (128, 1, 2, 4, 3)],
        "o": [(64, 1, 2, 4, 4), (64, 1, 4, 4, 4), (128, 1, 4, 4, 3)],
        "gate_up": [(128, 1, 1, 4, 3), (128, 1, 1, 4, 4), (64, 1, 1, 4, 4)],
        "down": [(128, 1, 8, 4, 3), (128, 1, 4, 4, 3), (64, 1, 4, 4, 3), (64, 1, 2, 4, 4)],
    },
}
"""By the most rows: outputs, slices, parts, warps and stages."""


class Layers:
    """Some layers that run one after the other, for m sequences of 128 positions."""

    def __init__(self, shapes: dict[str, tuple[int, int]], count: int, dtype: torch.dtype) -> None:
        self.ops, self.scratch = TritonOps(DEVICE), Scratch(torch.device(DEVICE))
        self.shapes, self.dtype, self.count = shapes, dtype, count
        self.heads = shapes["o"][1] // 128
        self.kv_heads = (shapes["qkv"][0] // 128 - self.heads) // 2
        self.packed: dict[str, list[Packed]] = {}
        for name, (n, k) in shapes.items():
            first = pack(grouped(n, k, **FORMATS["4 bits"]))
            assert first is not None
            bits = (-(2**15), 2**15)
            self.packed[name] = [
                replace(first, codes=torch.randint_like(first.codes, *bits)) for _ in range(count)
            ]
        self.wide: dict[str, list[torch.Tensor]] = {}
        self.norm = torch.ones(shapes["qkv"][1], device=DEVICE, dtype=dtype)
        self.rope = RopeTable(torch.randn(256, 128, device=DEVICE))

    def widen(self) -> None:
        """Add weights of 16 bits, to compare with."""
        for name, (n, k) in self.shapes.items():
            one = (torch.randn(n, k, device=DEVICE) * 0.02).to(self.dtype)
            self.wide[name] = [one.clone() for _ in range(self.count)]

    def start(self, m: int) -> None:
        self.step = make_step(
            [(1, 128)] * m, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=128,
            block_size=64, dtype=self.dtype, device=DEVICE,
        )  # fmt: skip
        self.x = torch.randn(m, self.shapes["qkv"][1], device=DEVICE).to(self.dtype)

    def run(self, multiply: Callable[[str, int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ops, step = self.ops, self.step
        ops.begin_step(step.batch)
        x, residual = self.x.clone(), self.x.clone()
        for layer in range(self.count):
            x, residual = ops.add_rms_norm(x, residual, self.norm, 1e-5)
            qkv = multiply("qkv", layer, x)
            ops.rope_and_cache(qkv, self.heads, self.rope, None, step.cache, step.batch)
            x = ops.attention(qkv, self.heads, 0.1, step.cache, step.batch)
            x = multiply("o", layer, x)
            x, residual = ops.add_rms_norm(x, residual, self.norm, 1e-5)
            x = multiply("down", layer, ops.silu_mul(multiply("gate_up", layer, x)))
        return x

    def by_plans(self, plans: Plans, name: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        same = dict(scratch=self.scratch, plan=plans[name], dependent=DEVICE == "cuda")
        return linear(x, self.packed[name][layer], None, **same)

    def by_backend(self, name: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        """As a model is multiplied: by `packed_strips`, where it is chosen."""
        return self.ops.grouped_linear(x, self.packed[name][layer])

    def in_16_bits(self, name: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(x, self.wide[name][layer])

    def time(self, multiply: Callable[[str, int, torch.Tensor], torch.Tensor]) -> float:
        """Microseconds of a layer."""
        return time_calls([partial(self.run, multiply)], budget_s=0.02).median / self.count


def rivals(name: str, m: int) -> list[PackedPlan]:
    """Plans that are tried in the place of the default one."""
    most = next(most for most in RIVALS if m <= most)
    cuts = RIVALS[most][name]
    ways = ((0, False), (64, False), (64, True))
    return [PackedPlan(*cut, prefetch, early) for cut in cuts for prefetch, early in ways]


def compile_one(m: int, n: int, k: int, plan: PackedPlan, dtype: torch.dtype) -> None:
    """In a process of its own: leaves the kernel in triton's cache on disk."""
    x = torch.zeros(m, k, device=DEVICE, dtype=dtype)
    weight = pack(grouped(n, k, **FORMATS["4 bits"]))
    try:
        linear(x, weight, None, Scratch(torch.device(DEVICE)), plan=plan, dependent=True)
    except Exception as error:
        print("does not compile:", m, plan, type(error).__name__, flush=True)


def compile_all(rows: list[int], shapes: dict[str, tuple[int, int]], dtype: torch.dtype) -> None:
    context = multiprocessing.get_context("spawn")
    works = {
        (max(m, 8), n, k, plan, dtype)
        for m in rows
        for name, (n, k) in shapes.items()
        for plan in rivals(name, m)
    }
    with concurrent.futures.ProcessPoolExecutor(15, mp_context=context) as pool:
        for done in [pool.submit(compile_one, *work) for work in works]:
            done.result()
    print(f"{len(works)} kernels compiled", flush=True)


def search(layers: Layers, m: int, until: float) -> tuple[Plans, dict]:
    """The best plan of each product, given those of the others."""
    plans = {
        name: choose_plan(m, n, k, best_quarter(n)) or PackedPlan(128, 1, 1, 8, 3)
        for name, (n, k) in layers.shapes.items()
    }
    layers.start(m)
    figure = {"m": m, "by default": layers.time(partial(layers.by_plans, plans))}
    figure["backend"] = layers.time(layers.by_backend)
    if layers.wide:
        figure["16 bits"] = layers.time(layers.in_16_bits)
    best = figure["by default"]
    for name in ("gate_up", "down", "qkv", "o"):
        tried = [(best, plans[name])]
        for plan in rivals(name, m):
            if time.perf_counter() > until:
                break
            try:
                passed = layers.time(partial(layers.by_plans, plans | {name: plan}))
            except Exception as problem:
                print("left out:", name, plan, type(problem).__name__)
                continue
            tried.append((passed, plan))
        tried.sort(key=lambda pair: pair[0])
        best, plans[name] = tried[0]
        figure[name] = [(passed, repr(plan)) for passed, plan in tried[:5]]
    figure["tuned"] = layers.time(partial(layers.by_plans, plans))
    return plans, figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="most for a number of rows")
    parser.add_argument("--save", action="store_true", help="keep the plans for the backend")
    parser.add_argument("--out", help="where to write the result file")
    args = parser.parse_args()
    torch.manual_seed(0)
    started, figures = time.perf_counter(), []
    shapes, dtype = SHAPES, torch.bfloat16
    if args.dry_run:
        shapes = {"qkv": (512, 256), "o": (256, 256), "gate_up": (256, 256), "down": (256, 128)}
        dtype, args.rows = torch.float16, [2]
        args.seconds = 0.1
    else:
        compile_all(args.rows, shapes, dtype)
    layers = Layers(shapes, 1 if args.dry_run else 6, dtype)
    layers.widen()
    for m in args.rows:
        plans, figure = search(layers, m, time.perf_counter() + args.seconds)
        figures.append(figure)
        wide = figure["16 bits"]
        print(
            f"m {m:4}: a layer in 16 bits {wide:.1f} us, in 4 bits {figure['by default']:.1f} "
            f"({wide / figure['by default']:.2f}x), tuned {figure['tuned']:.1f} "
            f"({wide / figure['tuned']:.2f}x), by the backend {figure['backend']:.1f} "
            f"({wide / figure['backend']:.2f}x)",
            flush=True,
        )
        for name in shapes:
            for passed, plan in figure[name][:4]:
                print(f"    {name:8} {passed:7.1f} {plan}")
        if args.save:
            kept = {case_of(m, layers.packed[name][0]): plan for name, plan in plans.items()}
            save_plans(plans_file(torch.device(DEVICE)), kept)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    if args.out:
        write_result(args.out, arguments=vars(args), figures=figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
