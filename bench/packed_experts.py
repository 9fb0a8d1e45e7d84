"""Mixtures of packed experts on one GPU: right first, then times beside 16 bits, for several plans.

    python bench/packed_experts.py --out bench/results/packed_experts.json
    TRITON_INTERPRET=1 python bench/packed_experts.py --dry-run    # on a CPU, with tiny shapes

One layer of GPT-OSS-20B and one of Qwen3-30B-A3B: order, both products and their sum. Runs without
an installation. Every call chooses experts anew, so that none is found in the L2 cache; each sample
is one CUDA graph. Kernels are compiled first, in several processes. Exits with status 1 when a
result is wrong.
"""

import argparse
import concurrent.futures
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

import torch
from machine import write_result
from triton.runtime.jit import JITFunction

from pagedcore.execution.expert_ops import Clamp, Experts, Routing
from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.execution.torch_quantized import widen_grouped
from pagedcore_kernels import moe as mixtures
from pagedcore_kernels import packed_experts, packed_widen
from pagedcore_kernels.bench.clock import time_calls
from pagedcore_kernels.expert_plans import ExpertPlan, candidate_plans
from pagedcore_kernels.packed_codes import E2M1
from pagedcore_kernels.packed_experts import PackedExperts, pack_experts
from pagedcore_kernels.packed_layout import POWERS, Packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [1, 8, 32, 64, 256, 1024, 4096]
CALLS = 24
"""In a sample, each with a choice of its own."""

LIMIT = 0.015
"""Of the relative error: rows, activations and parts of the sum are rounded to 16 bits."""


@dataclass(frozen=True)
class Layer:
    """The sizes of one layer."""

    num_experts: int
    num_chosen: int
    h: int
    width: int
    clamp: Clamp | None = None


LAYERS = {
    "gpt-oss-20b": Layer(32, 4, 2880, 2880, Clamp(1.702, 7.0)),
    "qwen3-30b-a3b": Layer(128, 8, 2048, 768),
}
FORMATS: dict[str, dict[str, Any]] = {
    "mxfp4": dict(bits=4, group=32, scale_dtype=POWERS, table=E2M1),
    "4 bits": dict(bits=4, group=128),
    "4 bits, zeros": dict(bits=4, group=128, zeros=True),
    "8 bits": dict(bits=8, group=128),
    "float8": dict(bits=8, group=0, float8=True, scale_dtype=torch.float32),
    "float8 blocks": dict(bits=8, group=128, float8=True, scale_dtype=torch.float32),
}
WANTED = {
    "gpt-oss-20b": ["mxfp4"],
    "qwen3-30b-a3b": ["4 bits", "4 bits, zeros", "8 bits", "float8", "float8 blocks"],
}
TINY = {
    "gpt-oss-20b": Layer(4, 2, 96, 64, Clamp(1.702, 7.0)),
    "qwen3-30b-a3b": Layer(4, 2, 128, 128),
}


def stack(
    rows: int,
    k: int,
    device: str,
    *,
    bits: int,
    group: int,
    scale_dtype: torch.dtype = torch.bfloat16,
    table: tuple[float, ...] | None = None,
    zeros: bool = False,
    float8: bool = False,
) -> Grouped:
    """Random codes, scaled so that what they stand for has about the size of 1 / sqrt(k)."""
    groups = k // (group or k)
    codes = torch.randint(0, 256, (rows, k * bits // 8), dtype=torch.uint8, device=device)
    if scale_dtype == POWERS:
        scale = torch.randint(118, 121, (rows, groups), dtype=torch.uint8, device=device)
        scale = scale.view(POWERS)
    else:
        size = {4: 5.0, 8: 74.0}[bits] if not float8 else 100.0
        scale = (torch.rand(rows, groups, device=device) + 0.5) / (size * k**0.5)
        scale = scale.to(scale_dtype)
    if float8 and codes.device.type != "meta":
        codes[codes & 127 == 127] = 0  # no number
    zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, device=device)
    return Grouped(
        codes=codes,
        scale=scale,
        bits=bits,
        zero=zero if zeros else None,
        table=torch.tensor(table, device=device) if table else None,
        float8=float8,
    )


def draw_experts(layer: Layer, kind: str, device: str, dtype: torch.dtype) -> Experts:
    count, h, f = layer.num_experts, layer.h, layer.width
    experts = Experts(
        gate_up=stack(count * 2 * f, h, device, **FORMATS[kind]),
        down=stack(count * h, f, device, **FORMATS[kind]),
        clamp=layer.clamp,
    )
    if layer.clamp is not None:
        experts.gate_up_bias = torch.randn(count, 2 * f, device=device).to(dtype)
        experts.down_bias = torch.randn(count, h, device=device).to(dtype)
    return experts


def described(layer: Layer, kind: str, dtype: torch.dtype) -> PackedExperts:
    """Packed experts without content, for which kernels can be compiled."""
    none = dict(dtype=torch.uint8, device="meta")
    table = FORMATS[kind].get("table")
    experts = draw_experts(layer, kind, "meta", dtype)
    for each in (experts.gate_up, experts.down):
        each.table = torch.tensor(table) if table else None
        each.codes = torch.empty(each.codes.shape, **none)
    packed = pack_experts(experts, dtype)
    assert isinstance(packed, PackedExperts)
    return packed


def compile_only(kernel: JITFunction, grid: object) -> Callable[..., None]:
    def launch(*args: Any, **kwargs: Any) -> None:
        kernel.run(*args, grid=grid, warmup=True, **kwargs)

    return launch


def compile_one(layer: Layer, kind: str | None, plan: ExpertPlan | int, dtype: torch.dtype) -> str:
    """In a process of its own: leaves the kernels in triton's cache on disk."""
    JITFunction.__getitem__ = compile_only
    if isinstance(plan, int):
        rows, plan = plan, None
    else:
        rows = 1
    x = torch.empty(rows, layer.h, dtype=dtype, device="meta")
    chosen = torch.empty(rows, layer.num_chosen, dtype=torch.int32, device="meta")
    weights = torch.empty(rows, layer.num_chosen, device="meta")
    try:
        if kind is None:
            mixtures.moe(x, weights, chosen, wide_of(layer, "meta", dtype))
        else:
            packed_experts.moe(x, weights, chosen, described(layer, kind, dtype), plan)
    except Exception as error:
        return f"does not compile: {kind} {plan} {type(error).__name__} {str(error)[:200]}"
    return ""


def wide_of(layer: Layer, device: str, dtype: torch.dtype) -> Experts:
    """Experts in 16 bits, whose numbers make no difference."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, shape[-1] ** -0.5)

    count, h, f = layer.num_experts, layer.h, layer.width
    has_bias = layer.clamp is not None
    return Experts(
        gate_up=draw(count, 2 * f, h),
        down=draw(count, h, f),
        gate_up_bias=draw(count, 2 * f) if has_bias else None,
        down_bias=draw(count, h) if has_bias else None,
        clamp=layer.clamp,
    )


def plans_for(layer: Layer, kind: str, m: int) -> Iterator[ExpertPlan]:
    """The plan for m rows, and others that are worth a try."""
    return candidate_plans(m * layer.num_chosen, layer.num_experts, has_powers=kind == "mxfp4")


def works_of(layers: dict[str, Layer], rows: list[int], dtype: torch.dtype) -> Iterator[tuple]:
    for name, layer in layers.items():
        for m in rows:
            yield layer, None, m, dtype
            for kind in WANTED[name]:
                for plan in plans_for(layer, kind, m):
                    yield layer, kind, plan, dtype


def compile_all(works: set[tuple]) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(14, mp_context=context) as pool:
        for done in [pool.submit(compile_one, *work) for work in works]:
            if done.result():
                print(done.result(), flush=True)
    print(f"{len(works)} works compiled", flush=True)


class Bench:
    """One layer in one format."""

    def __init__(self, name: str, layer: Layer, kind: str, dtype: torch.dtype) -> None:
        self.name, self.layer, self.kind, self.dtype = name, layer, kind, dtype
        self.plain = draw_experts(layer, kind, DEVICE, dtype)
        packed = pack_experts(self.plain, dtype)
        assert isinstance(packed, PackedExperts)
        assert isinstance(packed.gate_up, Packed)
        assert isinstance(packed.down, Packed)
        self.packed = packed
        self.bytes_of_one = (packed.gate_up.num_bytes + packed.down.num_bytes) / layer.num_experts
        self.ops = TorchOps(DEVICE)
        self.is_right = True

    def draw(self, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, and what they choose: experts are taken about equally often."""
        x = torch.randn(m, self.layer.h, device=DEVICE).to(self.dtype)
        scores = torch.randn(m, self.layer.num_experts, device=DEVICE)
        routing = Routing(num_chosen=self.layer.num_chosen, normalize=True)
        return x, *self.ops.route(scores, routing)

    def times(self, m: int, wide: Experts, most: int | None) -> dict[str, Any]:
        """Figures of m rows, with the first `most` plans."""
        drawn = [self.draw(m) for _ in range(CALLS if DEVICE == "cuda" else 1)]
        x, weights, chosen = drawn[0]
        exact = replace(
            self.plain,
            gate_up_bias=as_float(self.plain.gate_up_bias),
            down_bias=as_float(self.plain.down_bias),
        )
        want = self.ops.moe(x.float(), weights, chosen, exact)
        touched = sum(len(c.unique()) for _, _, c in drawn) / len(drawn)
        figure: dict[str, Any] = dict(
            name=self.name,
            kind=self.kind,
            rows=m,
            experts_touched=touched,
            bytes=touched * self.bytes_of_one,
            bytes_of_16_bits=touched * 6 * self.layer.h * self.layer.width,
        )
        calls = [partial(mixtures.moe, *some, wide) for some in drawn]
        figure["16 bits"] = time_calls(calls, budget_s=0.02).median
        tried = []
        for plan in islice(plans_for(self.layer, self.kind, m), most):
            passed = self._try(drawn, plan, want)
            if passed is not None:
                tried.append((passed, repr(plan)))
        figure["chosen"] = tried[0][0] if tried else None
        figure["tried"] = sorted(tried)
        return figure

    def _try(self, drawn: list, plan: ExpertPlan, want: torch.Tensor) -> float | None:
        calls = [partial(packed_experts.moe, *some, self.packed, plan) for some in drawn]
        poison = torch.full_like(want, torch.nan)  # what is not written shows
        del poison
        try:
            error = float((calls[0]().float() - want).norm() / want.norm())
            if not error <= LIMIT:
                print(f"WRONG {self.name} {self.kind} {len(want)} {plan}: {error:.2e}", flush=True)
                self.is_right = False
            return time_calls(calls, budget_s=0.02).median
        except Exception as problem:
            print("left out:", self.kind, plan, type(problem).__name__, str(problem)[:100])
            return None

    def widening_time(self) -> float:
        """Of all experts to 16 bits: what the way over 16 bits would add."""
        parts = [self.packed.gate_up, self.packed.down]
        calls = [lambda: [packed_widen.widen(p, 0, p.num_outputs, self.dtype) for p in parts]]
        return time_calls(calls, budget_s=0.02).median

    def check_widening(self) -> None:
        """The first expert's gate, in the packed order of rows."""
        got = packed_widen.widen(self.packed.gate_up, 0, 32, torch.float32)[::2]
        first = replace(
            self.plain.gate_up,
            codes=self.plain.gate_up.codes[:16],
            scale=self.plain.gate_up.scale[:16],
            zero=None if self.plain.gate_up.zero is None else self.plain.gate_up.zero[:16],
        )
        self.is_right &= torch.equal(got, widen_grouped(first, torch.float32))


def as_float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()


def show(figure: dict[str, Any]) -> None:
    ours = figure["chosen"] or float("nan")
    print(
        f"{figure['name']:14} {figure['kind']:14} rows {figure['rows']:5}: 16 bits "
        f"{figure['16 bits']:8.1f} us ({figure['bytes_of_16_bits'] / figure['16 bits'] / 1e6:.2f} "
        f"TB/s), packed {ours:8.1f} ({figure['bytes'] / ours / 1e6:.2f} TB/s), "
        f"{figure['16 bits'] / ours:.2f}x",
        flush=True,
    )
    for passed, plan in figure["tried"][:3]:
        print(f"        {passed:8.1f} {plan.removeprefix('ExpertPlan')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--only", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seconds", type=float, default=100, help="start nothing after these")
    parser.add_argument("--out", help="where to write the result file")
    args = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(0)
    rows = [5] if args.dry_run else args.rows
    dtype = torch.float16 if args.dry_run else torch.bfloat16
    layers = {name: (TINY if args.dry_run else LAYERS)[name] for name in args.only}
    if not args.dry_run:
        compile_all(set(works_of(layers, rows, dtype)))
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
    figures, widening, right = [], {}, True
    for name, layer in layers.items():
        wide = wide_of(layer, DEVICE, dtype)
        for kind in WANTED[name]:
            if kind not in args.formats or time.perf_counter() - started > args.seconds:
                print("left out:", name, kind)
                continue
            bench = Bench(name, layer, kind, dtype)
            bench.check_widening()
            passed = widening[f"{name}, {kind}"] = bench.widening_time()
            print(f"{name} {kind}: widening all takes {passed:.0f} us", flush=True)
            for m in rows:
                if time.perf_counter() - started > args.seconds:
                    print("left out:", name, kind, m)
                    break
                figures.append(bench.times(m, wide, most=2 if args.dry_run else None))
                show(figures[-1])
            right &= bench.is_right
            del bench
        del wide
    print(f"{time.perf_counter() - started:.0f} s; {'all right' if right else 'WRONG'}", flush=True)
    if args.out:
        write_result(args.out, arguments=vars(args), figures=figures, widening=widening)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
