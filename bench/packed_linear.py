"""Products with weights of 4 and 8 bits on one GPU: right first, then times beside 16 bits.

    python bench/packed_linear.py --out bench/results/packed_linear.json
    TRITON_INTERPRET=1 python bench/packed_linear.py --dry-run    # on a CPU, with tiny shapes

The linear layers of Llama-3.1-8B. Runs without an installation. Weights rotate so that none is
found in the L2 cache; each sample is one CUDA graph. Exits with status 1 when a result is wrong.
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

from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_quantized import widen, widen_grouped
from pagedcore_kernels import block_fp8, packed_linear, packed_widen
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.clock import num_rotations, time_calls
from pagedcore_kernels.packed_codes import E2M1
from pagedcore_kernels.packed_layout import Packed, pack
from pagedcore_kernels.packed_plans import (
    PackedPlan,
    best_quarter,
    candidate_plans,
    choose_plan,
)
from pagedcore_kernels.small_linear import Scratch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
NF4 = tuple(i / 8 - 1 for i in range(16))
"""Sixteen numbers; which ones makes no difference to the time."""

FORMATS = {
    "4 bits": dict(bits=4, group=128),
    "4 bits, zeros": dict(bits=4, group=128, zeros=True),
    "4 bits, minima": dict(bits=4, group=32, minima=True),
    "4 bits, groups of 32": dict(bits=4, group=32),
    "table": dict(bits=4, group=64, table=NF4, scale_dtype=torch.float32),
    "float4": dict(bits=4, group=32, table=E2M1),
    "8 bits": dict(bits=8, group=128),
    "8 bits, zeros": dict(bits=8, group=128, zeros=True),
    "8 bits, groups of 16": dict(bits=8, group=16, scale_dtype=torch.float32),
}


def grouped(n, k, *, bits, group, zeros=False, minima=False, table=None, scale_dtype=torch.float16):
    codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=DEVICE)
    shape = (n, k // group)
    scale = ((torch.rand(shape, device=DEVICE) + 0.5) * 0.02 / 2**bits).to(scale_dtype)
    return Grouped(
        codes=codes,
        scale=scale,
        bits=bits,
        zero=torch.randint(0, 2**bits, shape, dtype=torch.uint8, device=DEVICE) if zeros else None,
        minimum=-torch.rand(shape, device=DEVICE) * 0.01 if minima else None,
        table=torch.tensor(table, device=DEVICE) if table else None,
    )


def copies_of(weight: Packed) -> list[Packed]:
    """As many weights with codes of their own as it takes to pass through the L2 cache."""
    num = num_rotations(weight.num_bytes, 64)
    bits = (-(2**15), 2**15)
    return [weight] + [
        replace(weight, codes=torch.randint_like(weight.codes, *bits)) for _ in range(num - 1)
    ]


def plans_for(m: int, n: int, k: int, *, search: bool) -> list[PackedPlan]:
    """The plan for so many rows, and two that are near; or all that are worth a try."""
    quarter = best_quarter(n)
    if search:
        return [plan for plan in candidate_plans(m, n, k, quarter) if plan is not None]
    plan = choose_plan(m, n, k, quarter) or choose_plan(128, n, k, quarter)
    return [plan, replace(plan, early=not plan.early), replace(plan, parts=plan.parts * 2)]


def relative_error(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def checked(name: str, call: Callable[[], torch.Tensor], want: torch.Tensor, limit=0.01) -> bool:
    """Whether a product is right; what it is written to holds NaN before, as far as possible."""
    poison = torch.full_like(want, torch.nan)
    del poison
    error = relative_error(call(), want)
    if not error <= limit:
        print(f"WRONG {name}: {error:.2e}", flush=True)
    return error <= limit


def compile_one(m: int, n: int, k: int, kind: str, plan: PackedPlan, dtype: torch.dtype) -> None:
    """In a process of its own: leaves the kernel in triton's cache on disk."""
    x = torch.zeros(m, k, device=DEVICE, dtype=dtype)
    scratch = Scratch(torch.device(DEVICE))
    try:
        weight = pack(grouped(n, k, **FORMATS[kind]))
        packed_linear.linear(x, weight, None, scratch, plan=plan, dependent=True)
    except Exception as error:
        print("does not compile:", m, plan, type(error).__name__, str(error)[:200], flush=True)


def compiled_rows(m: int) -> int:
    """A number of rows that takes the same kernel."""
    return 8 if m <= 8 else min(m, 128)


def compile_all(works: set) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(14, mp_context=context) as pool:
        for done in [pool.submit(compile_one, *work) for work in works]:
            done.result()
    print(f"{len(works)} kernels compiled", flush=True)


class Bench:
    """All products of one shape."""

    def __init__(self, name: str, n: int, k: int, dtype: torch.dtype, dependent: bool) -> None:
        self.name, self.n, self.k, self.dtype, self.dependent = name, n, k, dtype, dependent
        self.ops = TritonOps(DEVICE)
        self.scratch = Scratch(torch.device(DEVICE))
        wide = (torch.randn(n, k, device=DEVICE) * 0.02).to(dtype)
        self.wide = [wide.clone() for _ in range(num_rotations(wide.nbytes, 64))]
        weight = grouped(n, k, **FORMATS["4 bits"])
        packed = pack(weight)
        assert packed is not None
        self.packed = copies_of(packed)
        self.exact = widen_grouped(weight, torch.float32).double()
        self.is_right = checked(
            f"{name} widened", partial(packed_widen.widen, packed, 0, n, dtype), self.exact
        )

    def times(self, m: int, plans: list[PackedPlan]) -> dict:
        x = torch.randn(m, self.k, device=DEVICE).to(self.dtype)
        want = x.double() @ self.exact.T
        figure = dict(name=self.name, m=m, n=self.n, k=self.k)
        calls = [partial(self.ops.linear, x, w) for w in self.wide]
        figure["16 bits"] = time_calls(calls, budget_s=0.05).median
        tried = []
        for plan in plans:
            passed = self._try(x, want, plan)
            if passed:
                tried.append((passed, repr(plan)))
        figure["chosen"] = tried[0][0] if tried else None
        figure["tried"] = sorted(tried)
        if m >= 64:
            calls = [partial(packed_widen.multiply_widened, x, w) for w in self.packed]
            self.is_right &= checked(f"{self.name} {m} by way of 16 bits", calls[0], want)
            figure["widened"] = time_calls(calls[:8], budget_s=0.05).median
        figure["bytes"] = self.packed[0].num_bytes
        return figure

    def _try(self, x, want, plan: PackedPlan) -> float | None:
        same = dict(bias=None, scratch=self.scratch, plan=plan, dependent=self.dependent)
        calls = [partial(packed_linear.linear, x, w, **same) for w in self.packed]
        try:
            self.is_right &= checked(f"{self.name} {len(x)} {plan}", calls[0], want)
            return time_calls(calls, budget_s=0.02).median
        except Exception as problem:
            print("left out:", self.name, len(x), plan, type(problem).__name__, str(problem)[:100])
            return None


def by_default(figure: dict) -> float:
    """The time of what the backend chooses."""
    has_plan = choose_plan(figure["m"], figure["n"], figure["k"]) is not None
    return figure["chosen"] if has_plan else figure["widened"]


def show(figure: dict) -> None:
    best = figure["chosen"]
    text = f"{figure['name']:8} m {figure['m']:4}: 16 bits {figure['16 bits']:7.1f} us, "
    text += f"4 bits {best:7.1f} ({figure['bytes'] / best / 1e6:4.2f} TB/s, "
    text += f"{figure['16 bits'] / best:4.2f}x)"
    text += f", widened {figure['widened']:.1f}" if "widened" in figure else ""
    print(text, flush=True)
    for passed, plan in figure["tried"][:3]:
        names = ("bn=", "slices=", "parts=", "num_warps=", "num_stages=", "prefetch=", "early=")
        for name in names:
            plan = plan.replace(name, "")
        print(f"        {passed:7.1f} {plan[11:-1]}")


def bench_formats(n: int, k: int, plans: dict[int, list[PackedPlan]], dtype, dependent) -> tuple:
    """Every format, with the best of a few plans."""
    figures, right, scratch = [], True, Scratch(torch.device(DEVICE))
    for kind, settings in FORMATS.items():
        weight = grouped(n, k, **settings)
        packed = pack(weight)
        assert packed is not None
        exact = widen_grouped(weight, torch.float32).double()
        right &= checked(f"{kind} widened", partial(packed_widen.widen, packed, 0, n, dtype), exact)
        weights = copies_of(packed)
        figure = dict(kind=kind, n=n, k=k, bytes=packed.num_bytes)
        for m, some in plans.items():
            times = {}
            for plan, other in [(plan, other) for plan in some for other in (dtype, torch.float16)]:
                x = torch.randn(m, k, device=DEVICE).to(other)
                same = dict(bias=None, scratch=scratch, plan=plan, dependent=dependent)
                calls = [partial(packed_linear.linear, x, w, **same) for w in weights]
                right &= checked(f"{kind} {m} {other}", calls[0], x.double() @ exact.T)
                if other == dtype:
                    times[repr(plan)] = time_calls(calls, budget_s=0.02).median
            figure[f"m {m}"] = min(times.values())
            figure[f"plan {m}"] = min(times, key=times.__getitem__)
        figures.append(figure)
        shown = [f"{key} {value:.1f}" for key, value in figure.items() if key[:2] == "m "]
        rates = [f"{packed.num_bytes / figure[f'm {m}'] / 1e6:.2f}" for m in plans]
        print(f"{kind:22} {n}x{k}: {', '.join(shown)} us; {', '.join(rates)} TB/s", flush=True)
    return figures, right


def bench_fp8(name: str, n: int, k: int, rows: list[int]) -> tuple[list[dict], bool]:
    """8-bit floats with one scale for each output, and with one for each 128 x 128 block."""
    ops, scratch = TritonOps(DEVICE), Scratch(torch.device(DEVICE))
    packed = ops.quantize(torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02)
    shares = torch.rand(n // 128, k // 128, device=DEVICE).add_(0.5).mul_(1e-3)
    shares = shares.repeat_interleave(128, 0).contiguous()
    num = num_rotations(n * k, 64)
    weights = [packed.values.clone() for _ in range(num)]
    exact = widen(packed.values, shares, torch.float32).double()
    figures, right = [], True
    for m in rows:
        x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
        figure = dict(name=name, m=m, n=n, k=k)
        calls = [partial(ops.scaled_linear, x, w, packed.scale) for w in weights]
        figure["channels"] = time_calls(calls, budget_s=0.03).median
        columns = shares.t().contiguous().t()  # as a model's layer keeps them
        want = x.double() @ exact.T
        options = {"groups": ops.scaled_linear}
        if m <= 16:
            options["groups, our own"] = partial(by_blocks, scratch=scratch)
        for kind, multiply in options.items():
            calls = [partial(multiply, x, w, columns) for w in weights]
            right &= checked(f"{name} {m} {kind}", calls[0], want, limit=0.05)
            figure[kind] = time_calls(calls, budget_s=0.03).median
        if 1 < m <= 16:
            calls = [partial(by_rows, ops, x, w, packed.scale) for w in weights]
            figure["channels, library"] = time_calls(calls, budget_s=0.03).median
        figures.append(figure)
        shown = [f"{key} {value:.1f}" for key, value in figure.items() if isinstance(value, float)]
        print(f"fp8 {name:8} m {m:4}: {', '.join(shown)}", flush=True)
    return figures, right


def by_blocks(x, weight, shares, scratch):
    values, scale = block_fp8.quantize_groups(x, dependent=True)
    return block_fp8.block_linear(
        values, scale, weight, shares, None, x.dtype, scratch, dependent=True
    )


def by_rows(ops, x, weight, scale):
    rows = ops.quantize(x)
    return torch._scaled_mm(
        rows.values,
        weight.t(),
        rows.scale,
        scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--search", action="store_true", help="try every plan; takes minutes")
    parser.add_argument("--only", nargs="+", choices=["plans", "formats", "fp8"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", help="where to write the result file")
    args = parser.parse_args()
    started, wanted = time.perf_counter(), args.only or ["plans", "formats", "fp8"]
    torch.manual_seed(0)
    shapes = {"tiny": (48, 256)} if args.dry_run else SHAPES
    rows = [1, 9] if args.dry_run else args.rows
    dtype = torch.float16 if args.dry_run else torch.bfloat16
    dependent = DEVICE == "cuda"
    tiny = [PackedPlan(16, 1, 2), PackedPlan(16, 2, 1)]
    middle = {1: tiny, 9: tiny}
    works = set()
    if not args.dry_run:
        middle = {
            1: [PackedPlan(128, 1, 4, 4, 5), PackedPlan(32, 4, 1, 4, 4)],
            16: [PackedPlan(128, 1, 2, 4, 4, 0, True), PackedPlan(128, 1, 4, 4, 4)],
        }
        if "plans" in wanted:
            works |= {
                (compiled_rows(m), n, k, "4 bits", plan, dtype)
                for n, k in shapes.values()
                for m in rows
                for plan in plans_for(m, n, k, search=args.search)
            }
        if "formats" in wanted:
            works |= {
                (m, *SHAPES["gate_up"], kind, plan, some)
                for kind in FORMATS
                for some in (dtype, torch.float16)
                for m, plans in middle.items()
                for plan in plans
            }
        compile_all(works)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
    result, right = {}, True
    if "plans" in wanted:
        figures = result["plans"] = []
        for name, (n, k) in shapes.items():
            bench = Bench(name, n, k, dtype, dependent)
            for m in rows:
                plans = tiny if args.dry_run else plans_for(m, n, k, search=args.search)
                figures.append(bench.times(m, plans))
                show(figures[-1])
            right &= bench.is_right
            del bench
        for m in rows:
            wide = sum(f["16 bits"] for f in figures if f["m"] == m)
            ours = sum(by_default(f) for f in figures if f["m"] == m)
            best = sum(f["tried"][0][0] for f in figures if f["m"] == m)
            print(
                f"layer, m {m:4}: 16 bits {wide:7.1f} us, 4 bits {ours:7.1f}, {wide / ours:.2f}x; "
                f"best packed {best:.1f}"
            )
    if "formats" in wanted:
        n, k = (48, 256) if args.dry_run else SHAPES["gate_up"]
        result["formats"], good = bench_formats(n, k, middle, dtype, dependent)
        right &= good
    if "fp8" in wanted and not args.dry_run:
        result["fp8"] = []
        for name, (n, k) in shapes.items():
            figures, good = bench_fp8(name, n, k, args.rows)
            result["fp8"] += figures
            right &= good
    print(f"{time.perf_counter() - started:.0f} s; {'all right' if right else 'WRONG'}", flush=True)
    if args.out:
        write_result(args.out, arguments=vars(args), **result)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
