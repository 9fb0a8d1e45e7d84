"""Check every kernel against torch, time it, and print its rate beside what the device can do.

    python bench/kernels.py --out bench/results/kernels.json
    python bench/kernels.py --tune decode extend        # search settings: decode, extend, packed
    TRITON_INTERPRET=1 python bench/kernels.py --dry-run    # on a CPU, with tiny shapes

What `pagedcore bench kernels` does, without an installation. Exits with status 1 when a kernel is
wrong.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

import torch
from machine import write_result

from pagedcore.execution.kernel_bench import Check, Figure, KernelBench, Trial
from pagedcore_kernels.backend import TritonOps


def show(figure: Figure, ceilings: Mapping[str, float]) -> None:
    rate, unit = figure.rate / 1e12, "T" + figure.unit
    case, passed = figure.case, figure.time
    print(
        f"{figure.kernel:18} {case:38} {passed.median:10.1f} us (min {passed.least:.1f}, "
        f"p99 {passed.p99:.1f}) {rate:8.3f} {unit:7} {figure.rate / ceilings[figure.unit]:6.1%}",
        flush=True,
    )


def run_checks(bench: KernelBench) -> list[Check]:
    checks = []
    for check in bench.checks():
        checks.append(check)
        if not check.passed:
            print(f"WRONG {check.name}: {check.error:.2e}, allowed {check.limit:.0e}", flush=True)
    passed = sum(check.passed for check in checks)
    print(f"{passed} of {len(checks)} checks passed", flush=True)
    return checks


def run_speed(bench: KernelBench, ceilings: Mapping[str, float]) -> list[Figure]:
    copy, product = ceilings["B/s"] / 1e12, ceilings["FLOP/s"] / 1e12
    print(f"copy: {copy:.2f} TB/s   matrix product: {product:.1f} TFLOP/s", flush=True)
    figures = []
    for figure in bench.figures():
        show(figure, ceilings)
        figures.append(figure)
    return figures


def run_tuning(bench: KernelBench, kernels: list[str]) -> list[Trial]:
    by_case: dict[str, list[Trial]] = {}
    for kernel in kernels:
        for trial in bench.trials(kernel):
            by_case.setdefault(trial.case, []).append(trial)
    for case, tried in by_case.items():
        print(case)
        for trial in sorted(tried, key=lambda trial: -trial.rate)[:6]:
            print(f"    {trial.rate / 1e12:8.3f} T/s  {trial.config}", flush=True)
    return [trial for tried in by_case.values() for trial in tried]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--tune", nargs="+", default=[], choices=["decode", "extend", "packed"])
    parser.add_argument("--skip", nargs="+", default=[], choices=["checks", "speed"])
    parser.add_argument("--cache-gib", type=float, default=16.0, help="keys and values to read")
    parser.add_argument("--out", help="where to write the result file")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = TritonOps(device).kernel_bench(small=args.dry_run, cache_gib=args.cache_gib)
    started = time.perf_counter()
    checks = [] if "checks" in args.skip else run_checks(bench)
    ceilings = bench.ceilings()
    figures = [] if "speed" in args.skip else run_speed(bench, ceilings)
    trials = run_tuning(bench, args.tune)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    if args.out:
        write_result(
            args.out,
            arguments=vars(args),
            copy_bytes_per_second=ceilings["B/s"],
            product_flops=ceilings["FLOP/s"],
            checks=[asdict(check) for check in checks],
            figures=[asdict(figure) for figure in figures],
            trials=[asdict(trial) for trial in trials],
        )
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
