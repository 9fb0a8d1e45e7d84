"""Small products, 8 bits and draws on one GPU: right first, then times beside the library's.

    python bench/linear_sampling.py --out bench/results/linear_sampling.json
    python bench/linear_sampling.py --only linear fp8 --tune    # search plans for each shape
    TRITON_INTERPRET=1 python bench/linear_sampling.py --dry-run    # on a CPU, with tiny shapes

Runs without an installation. Weights rotate so that none is found in the L2 cache; each sample is
one CUDA graph. `step` is all linear layers of one decode step, as a model runs them. "pdl" kernels
may start while the one before them ends. Exits with status 1 when a result is wrong.
"""

import argparse
import concurrent.futures
import multiprocessing
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

import torch
from machine import write_result
from model_shapes import SHAPES
from torch.nn import functional

from pagedcore.execution import torch_sampling
from pagedcore.execution.ops import SamplingTensors
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.clock import num_rotations, time_calls
from pagedcore_kernels.sampling import sample
from pagedcore_kernels.small_linear import Scratch, linear
from pagedcore_kernels.small_linear_plans import (
    DotPlan,
    Plan,
    RowPlan,
    choose_plan,
    choose_scaled_plan,
    default_plan,
)

COPY = 4.25e12
"""Bytes per second of a device-to-device copy on an H200."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [1, 2, 4, 8, 16, 32, 64]
TUNED_ROWS = [1, 8, 16, 32, 64]


def layer_shapes(name: str) -> list[tuple[int, int]]:
    """[out, in] of one layer's products."""
    c = SHAPES[name]
    h, f, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    return [((heads + 2 * kv_heads) * d, h), (h, heads * d), (2 * f, h), (h, f)]


def weights_of(n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    num = num_rotations(n * k * dtype.itemsize, 64)
    return [(torch.randn(n, k, device=DEVICE) * 0.02).to(dtype) for _ in range(num)]


def time_plan(x, weights, scratch, plan: Plan | None, *, dependent=False, scale=None) -> float:
    same = dict(scratch=scratch, plan=plan, dependent=dependent, scale=scale)
    return time_calls([partial(linear, x, w, **same) for w in weights], budget_s=0.02).median


def check_linear(x, weight, scratch, plan: Plan, scale=None) -> float:
    got = linear(x, weight, scratch=scratch, plan=plan, scale=scale)
    wide = weight.double() if scale is None else weight.double() * scale.double()
    return relative_error(got, x.double() @ wide.T)


def relative_error(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def candidates(m: int) -> list[Plan]:
    """Plans worth a try; those that do not fit shared memory are left out."""
    if m == 1:
        shapes = [(1, 2048, 4), (2, 1024, 2), (2, 1024, 4), (2, 2048, 4), (4, 512, 2)]
        shapes += [(4, 1024, 4), (4, 2048, 4), (8, 512, 4), (8, 1024, 4), (8, 1024, 8)]
        plans: list[Plan] = [RowPlan(*s, unroll) for s in shapes for unroll in (1, 2, 4)]
        plans += [RowPlan(4, 1024, 4, 3), RowPlan(2, 1024, 4, 3), RowPlan(8, 1024, 4, 3)]
        return plans
    bm = max(16, 1 << (m - 1).bit_length())
    cuts = [(64, 4, 4, 4), (64, 8, 8, 3), (128, 4, 4, 3), (128, 1, 4, 4)]
    plans = []
    for bn, (bk, slices, warps, stages), parts in product((8, 16, 32, 64), cuts, (1, 2, 4)):
        if stages * slices * bk * (bn + bm) * 2 <= 200_000 and (slices > 1 or bn >= 16):
            plans.append(DotPlan(bn, bk, slices, parts, warps, stages))
    return plans


def compile_plan(m: int, n: int, k: int, plan: Plan, dtype: torch.dtype) -> None:
    """In a process of its own: leaves the kernel in triton's cache on disk."""
    x = torch.zeros(m, k, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.zeros(n, k, device=DEVICE, dtype=dtype)
    scale = torch.zeros(n, 1, device=DEVICE) if dtype.itemsize == 1 else None
    try:
        linear(x, weight, scratch=Scratch(torch.device(DEVICE)), plan=plan, scale=scale)
    except Exception as error:
        print("does not compile:", plan, type(error).__name__, flush=True)


def compile_all(shapes: list[tuple[int, int]], rows: list[int], dtype=torch.bfloat16) -> None:
    works = {}
    for (n, k), m in product(shapes, rows):
        for plan in candidates(m):
            columns = plan.bk * (plan.unroll if isinstance(plan, RowPlan) else plan.slices)
            parts = 1 if isinstance(plan, RowPlan) else plan.parts
            works[plan, max(m, 15), k % (columns * parts) == 0] = (m, n, k, plan, dtype)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(14, mp_context=context) as pool:
        for done in [pool.submit(compile_plan, *work) for work in works.values()]:
            done.result()
    print(f"{len(works)} kernels compiled", flush=True)


def bench_linear(args, shapes: list[tuple[int, int]]) -> tuple[list[dict], bool]:
    rows = args.rows or (TUNED_ROWS if args.tune else ROWS)
    if args.tune and DEVICE == "cuda":
        compile_all(shapes, rows)
    dtype = torch.float32 if args.dry_run else torch.bfloat16
    scratch = Scratch(torch.device(DEVICE))
    figures, right = [], True
    for n, k in shapes:
        weights = weights_of(n, k, dtype)
        floor = n * k * dtype.itemsize / COPY * 1e6
        for m in rows:
            x = torch.randn(m, k, device=DEVICE).to(dtype)
            library = time_calls([partial(functional.linear, x, w) for w in weights]).median
            plan = choose_plan(m, n, k) or (RowPlan() if m == 1 else DotPlan())
            figure = dict(m=m, n=n, k=k, floor=floor, library=library, plan=repr(plan))
            figure["error"] = check_linear(x, weights[0], scratch, plan)
            figure["chosen"] = choose_plan(m, n, k) is not None
            figure["ours"] = time_plan(x, weights, scratch, plan)
            if DEVICE == "cuda":
                figure["pdl"] = time_plan(x, weights, scratch, plan, dependent=True)
            if args.tune:
                figure["tried"] = tune(x, weights, scratch, candidates(m))
            figures.append(figure)
            right &= figure["error"] < 0.01
            show_linear(figure)
    return figures, right


def tune(x, weights, scratch, plans: list[Plan], scale=None) -> list[tuple[float, str, float]]:
    tried = []
    for plan in plans:
        try:
            error = check_linear(x, weights[0], scratch, plan, scale)
            tried.append((time_plan(x, weights, scratch, plan, scale=scale), repr(plan), error))
        except Exception as problem:  # too much shared memory, mostly
            print("    left out:", plan, type(problem).__name__, flush=True)
    return sorted(tried)


def show_linear(figure: dict) -> None:
    text = f"m {figure['m']:3} n {figure['n']:6} k {figure['k']:5}: floor {figure['floor']:7.2f} us"
    text += f", library {figure['library']:7.2f}, ours {figure['ours']:7.2f}"
    text += f" (pdl {figure['pdl']:7.2f})" if "pdl" in figure else ""
    text += "" if figure["chosen"] else " not chosen"
    text += f" error {figure['error']:.1e}" if figure["error"] > 0.004 else ""
    print(text, flush=True)
    show_tried(figure)


def show_tried(figure: dict) -> None:
    for passed, plan, error in figure.get("tried", [])[:3]:
        print(f"    {passed:7.2f} us {plan} {f'WRONG {error:.1e}' if error > 0.01 else ''}")


def bench_fp8(args, shapes: list[tuple[int, int]]) -> tuple[list[dict], bool]:
    """16 bits of the library, 8 bits of our own (rows as they are), and of the library."""
    ops, scratch = TritonOps(DEVICE), Scratch(torch.device(DEVICE))
    if args.tune:
        compile_all(shapes, [m for m in TUNED_ROWS if m > 1], torch.float8_e4m3fn)
    figures, right = [], True
    for n, k in shapes:
        wide = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02
        packed = ops.quantize(wide)
        scale = packed.scale
        weights = [packed.values.clone() for _ in range(num_rotations(n * k, 64))]
        plain = [wide.clone() for _ in range(num_rotations(n * k * 2, 64))]
        for m in (1, 8, 16, 32, 64, 128, 256, 512, 4096, 8192):
            x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
            rows = ops.quantize(x)
            figure = dict(m=m, n=n, k=k, floor=n * k / COPY * 1e6)
            figure["16 bits"] = time_calls([partial(functional.linear, x, w) for w in plain]).median
            plan = choose_scaled_plan(m, n, k) or default_plan(m)
            if m <= 256:
                figure["ours"] = time_plan(x, weights, scratch, plan, scale=scale)
                figure["error"] = check_linear(x, packed.values, scratch, plan, scale)
                right &= figure["error"] < 0.01
            for name, fast in (("scaled", False), ("scaled, fast", True)):
                calls = [partial(scaled_mm, rows, w, scale, fast) for w in weights]
                figure[name] = time_calls(calls).median
                want = dequantized(rows) @ dequantized(packed).T
                figure[f"{name}: error"] = relative_error(calls[0](), want)
                right &= figure[f"{name}: error"] < 0.01
            figure["rounding"] = time_calls([partial(ops.quantize, x)]).median
            if args.tune and m in TUNED_ROWS:
                figure["tried"] = tune(x, weights, scratch, candidates(m), scale)
            figures.append(figure)
            shown = {key: round_(value) for key, value in figure.items() if key != "tried"}
            print("fp8", " ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
            show_tried(figure)
    return figures, right


def dequantized(q) -> torch.Tensor:
    return q.values.float() * q.scale


def scaled_mm(rows, weight, scale, fast: bool) -> torch.Tensor:
    return torch._scaled_mm(
        rows.values,
        weight.t(),
        rows.scale,
        scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def bench_fused() -> list[dict]:
    """Rounding to 8 bits at the end of a kernel, and in one of its own."""
    ops, figures = TritonOps(DEVICE), []
    for rows, h, width in product((64, 256, 8192), (4096,), (14336,)):
        x, residual = (torch.randn(rows, h, device=DEVICE, dtype=torch.bfloat16) for _ in "xr")
        gate_up = torch.randn(rows, 2 * width, device=DEVICE, dtype=torch.bfloat16)
        norm = torch.ones(h, device=DEVICE, dtype=torch.bfloat16)
        figure = dict(rows=rows)
        for name, call in {
            "norm": lambda x=x, r=residual, w=norm: ops.add_rms_norm(x, r, w, 1e-5),
            "norm in 8": lambda x=x, r=residual, w=norm: ops.add_rms_norm_quantized(x, r, w, 1e-5),
            "silu": lambda g=gate_up: ops.silu_mul(g),
            "silu in 8": lambda g=gate_up: ops.silu_mul_quantized(g),
            "rounding h": lambda x=x: ops.quantize(x),
            "rounding width": lambda g=gate_up, w=width: ops.quantize(g[:, :w]),
        }.items():
            figure[name] = time_calls([call]).median
        figures.append(figure)
        print("fused", " ".join(f"{k} {round_(v)}" for k, v in figure.items()), "us", flush=True)
    return figures


def bench_step(args) -> list[dict]:
    """All linear layers of a decode step, one after the other."""
    figures = []
    for name in args.shapes:
        layers, c = layer_shapes(name), SHAPES[name]
        shapes = layers * c["num_hidden_layers"] + [(c["vocab_size"], c["hidden_size"])]
        weights = [torch.randn(s, device=DEVICE, dtype=torch.bfloat16) * 0.02 for s in shapes]
        floor = sum(w.numel() for w in weights) * 2 / COPY * 1e3
        scratch = Scratch(torch.device(DEVICE))
        for m in (1, 8, 32, 64):
            figure = dict(shape=name, m=m, floor=floor)
            for mode in ("library", "ours", "pdl"):
                run = partial(run_step, weights, m, mode, scratch)
                figure[mode] = time_calls([run]).median / 1e3
            figures.append(figure)
            print("step", " ".join(f"{k} {round_(v)}" for k, v in figure.items()), "ms", flush=True)
        del weights
    return figures


def run_step(weights, m: int, mode: str, scratch: Scratch) -> None:
    xs = {}
    for w in weights:
        n, k = w.shape
        x = xs.setdefault(k, torch.empty(m, k, device=DEVICE, dtype=w.dtype))
        plan = choose_plan(m, n, k)
        if mode == "library" or plan is None:
            functional.linear(x, w)
        else:
            linear(x, w, scratch=scratch, plan=plan, dependent=mode == "pdl")


def round_(value):
    return round(value, 3) if isinstance(value, float) else value


def parameters(num: int, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0) -> SamplingTensors:
    def column(value, dtype=torch.float32):
        return torch.full((num,), value, dtype=dtype, device=DEVICE)

    filtered = top_k > 0 or top_p < 1 or min_p > 0
    return SamplingTensors(
        temperature=column(temperature),
        min_p=column(min_p),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p),
        uniform=torch.rand(num, device=DEVICE),
        all_greedy=temperature == 0,
        any_filter=filtered,
    )


SAMPLING = {
    "greedy": dict(temperature=0.0),
    "plain": {},
    "top-k 20, top-p 0.95": dict(top_k=20, top_p=0.95),
    "top-k 1000": dict(top_k=1000),
    "top-p 0.9": dict(top_p=0.9),
    "min-p 0.05": dict(min_p=0.05),
}


def bench_sampling(args) -> tuple[list[dict], bool]:
    vocab_size, batches = (3000, [2]) if args.dry_run else (151936, [1, 32, 256, 1024])
    figures, right = [], True
    for num, (name, filters), spread in product(batches, SAMPLING.items(), (1.0, 4.0)):
        if spread == 1.0 and "top-p 0.9" not in name:
            continue  # how flat the logits are matters for top-p alone
        logits = (torch.randn(num, vocab_size, device=DEVICE) * spread).to(torch.bfloat16)
        sampling = parameters(num, **filters)
        tokens = sample(logits, sampling)
        wrong = misplaced(tokens, logits, sampling)
        right &= wrong <= 0.02
        passed = time_calls([partial(sample, logits, sampling)]).median
        figure = dict(rows=num, what=name, spread=spread, ours=passed, misplaced=wrong)
        if num <= 256:
            plain = partial(torch_sampling.sample, logits, sampling)
            figure["torch"] = time_calls([plain], budget_s=0.05).median
        figures.append(figure)
        print("sample", " ".join(f"{k} {round_(v)}" for k, v in figure.items()), "us", flush=True)
    return figures, right


def misplaced(tokens, logits, sampling) -> float:
    """Share of rows whose token is not where the running mass passes the uniform, up to 1e-4."""
    if sampling.all_greedy:
        best = logits.amax(-1)
        return float((logits.gather(1, tokens[:, None])[:, 0] != best).float().mean())
    wrong = 0
    for first in range(0, len(tokens), 64):
        part = slice(first, first + 64)
        some = SamplingTensors(
            temperature=sampling.temperature[part],
            min_p=sampling.min_p[part],
            top_k=sampling.top_k[part],
            top_p=sampling.top_p[part],
            uniform=sampling.uniform[part],
            all_greedy=False,
            any_filter=sampling.any_filter,
        )
        probs = torch_sampling.filter_scores(logits[part].float(), some).double().softmax(-1)
        mass = probs.gather(1, tokens[part, None])[:, 0]
        end = probs.cumsum(-1).gather(1, tokens[part, None])[:, 0]
        uniform = some.uniform.double()
        fine = (mass > 0) & (end - mass - 1e-4 <= uniform) & (uniform <= end + 1e-4)
        wrong += int((~fine).sum())
    return wrong / len(tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any device")
    parts = ["linear", "step", "fp8", "sampling"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--tune", action="store_true", help="try every plan for every shape")
    parser.add_argument("--rows", nargs="+", type=int, help="of the products")
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6b", "llama-3.1-8b"])
    parser.add_argument("--out", help="where to write the result file")
    args = parser.parse_args()
    started = time.perf_counter()
    shapes = [(48, 64)] if args.dry_run else []
    if not args.dry_run:
        for name in args.shapes:
            c = SHAPES[name]
            shapes += [*layer_shapes(name), (c["vocab_size"], c["hidden_size"])]
    result, right = {}, True
    if "linear" in args.only:
        result["linear"], fine = bench_linear(args, shapes)
        right &= fine
    if "step" in args.only and not args.dry_run:
        result["step"] = bench_step(args)
    if "fp8" in args.only and not args.dry_run:
        big = [(n, k) for n, k in shapes if n * k >= 2**24 and n < 100_000]
        result["fp8"], fine = bench_fp8(args, big)
        result["fused"] = bench_fused()
        right &= fine
    if "sampling" in args.only:
        result["sampling"], fine = bench_sampling(args)
        right &= fine
    print(f"{'all right' if right else 'WRONG'}, {time.perf_counter() - started:.0f} s", flush=True)
    if args.out:
        write_result(args.out, arguments=vars(args), **result)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
