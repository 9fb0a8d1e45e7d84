"""Check every kernel against torch, time it, and print its rate beside what the device can do.

    python bench/kernels.py --out bench/results/kernels.json
    python bench/kernels.py --tune decode extend        # search settings of the attention kernels
    TRITON_INTERPRET=1 python bench/kernels.py --dry-run    # on a CPU, with tiny shapes

Runs without an installation. Exits with status 1 when a kernel is wrong.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

import torch
from machine import write_result

from pagedcore_kernels.bench.checks import Check, check_kernels
from pagedcore_kernels.bench.clock import copy_bandwidth
from pagedcore_kernels.bench.speed import (
    AttentionCase,
    Figure,
    Pool,
    attention_figures,
    dense_attention_figures,
    moe_figures,
    rope_figures,
    row_figures,
)
from pagedcore_kernels.bench.tuning import Trial, decode_configs, extend_configs, tune
from pagedcore_kernels.decode_attention import choose_decode
from pagedcore_kernels.extend_plan import choose_extend

HEADS = {"G 2": (16, 8), "G 4": (32, 8), "G 8": (32, 4)}


def decode_cases(batches: list[int], contexts: list[int]) -> list[AttentionCase]:
    cases = []
    for heads in HEADS.values():
        for batch in batches:
            cases += [AttentionCase(*heads, (context,) * batch) for context in contexts]
        mixed = tuple(int(n) for n in torch.linspace(100, 1124, 256))
        steep = (8192,) * 8 + (819,) * 56
        cases += [AttentionCase(*heads, mixed), AttentionCase(*heads, steep)]
    return cases


def extend_cases() -> list[AttentionCase]:
    cases = []
    for heads in (HEADS["G 2"], HEADS["G 4"]):
        cases += [AttentionCase(*heads, (n,), n) for n in (1024, 4096, 16384)]
        cases += [AttentionCase(*heads, (4096,) * 4, 4096), AttentionCase(*heads, (512,) * 16, 512)]
        cases += [AttentionCase(*heads, (4160,), 64), AttentionCase(*heads, (10240,), 2048)]
    return cases


def show(figure: Figure, copy: float) -> None:
    rate, unit = figure.rate / 1e12, "T" + figure.unit
    share = f"{figure.rate / copy:6.1%} of copy" if figure.unit == "B/s" else ""
    case, passed = figure.case, figure.time
    print(
        f"{figure.kernel:18} {case:38} {passed.median:10.1f} us (min {passed.least:.1f}, "
        f"p99 {passed.p99:.1f}) {rate:8.3f} {unit:7} {share}",
        flush=True,
    )


def run_checks(device: str, small: bool) -> list[Check]:
    checks = []
    for check in check_kernels(device, small=small):
        checks.append(check)
        if not check.passed:
            print(f"WRONG {check.name}: {check.error:.2e}, allowed {check.limit:.0e}", flush=True)
    passed = sum(check.passed for check in checks)
    print(f"{passed} of {len(checks)} checks passed", flush=True)
    return checks


def run_speed(args: argparse.Namespace, device: str, num_sms: int) -> tuple[list[Figure], float]:
    figures = []
    if args.dry_run:
        copy = copy_bandwidth(device, 1 << 20)
        pool = Pool(64, torch.float16, device)
        attention = [AttentionCase(4, 2, (70, 3)), AttentionCase(4, 2, (70,), 70)]
        decode = choose_decode(128, torch.float16, 64, 1 << 17)
        works = [
            attention_figures(
                pool, decode, lambda g: choose_extend(128, torch.float16, g, 1 << 17), 4, attention
            ),
            rope_figures(pool, [3]),
            row_figures(device, [(3, 64)]),
            moe_figures(device, [3], (8, 2, 64, 32)),
        ]
    else:
        copy = copy_bandwidth(device)
        shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
        decode = choose_decode(128, torch.bfloat16, 64, shared)
        pool = Pool(args.pool_blocks, torch.bfloat16, device)
        batches = [64, 256] if args.decode_only else [1, 32, 64, 256, 1024]
        cases = decode_cases(batches, [256, 1024, 4096])
        extends = [] if args.decode_only else extend_cases()
        works = [
            attention_figures(
                pool,
                decode,
                lambda g: choose_extend(128, torch.bfloat16, g, shared),
                num_sms,
                [case for case in cases + extends if fits(case, pool)],
            ),
            dense_attention_figures(extend_cases(), device),
            rope_figures(pool, [1, 256, 8192]),
            row_figures(device, [(1, 1024), (256, 1024), (256, 4096), (16384, 1024), (8192, 4096)]),
            moe_figures(device, [1, 32, 256, 4096], (128, 8, 2048, 768)),
        ]
        works = works[:1] if args.decode_only else works
    print(f"copy: {copy / 1e12:.2f} TB/s", flush=True)
    for work in works:
        for figure in work:
            show(figure, copy)
            figures.append(figure)
    return figures, copy


def fits(case: AttentionCase, pool: Pool) -> bool:
    """Whether the case does not read a block twice."""
    available = 4 * pool.key.numel()
    return case.bytes_read <= available


def run_tuning(args: argparse.Namespace, num_sms: int) -> list[Trial]:
    pool = Pool(min(args.pool_blocks, 1 << 15), torch.bfloat16, "cuda")
    trials = []
    if "decode" in args.tune:
        cases = [
            AttentionCase(*heads, (context,) * batch)
            for heads in HEADS.values()
            for batch, context in ((1, 1024), (32, 256), (256, 256), (256, 1024))
        ]
        trials += show_trials(tune(cases, pool, num_sms, list(decode_configs())))
    if "extend" in args.tune:
        cases = [
            AttentionCase(*heads, (length,) * num, length)
            for heads in (HEADS["G 2"], HEADS["G 4"])
            for num, length in ((1, 1024), (4, 4096))
        ]
        trials += show_trials(tune(cases, pool, num_sms, list(extend_configs())))
    return trials


def show_trials(trials) -> list[Trial]:
    by_case: dict[str, list[Trial]] = {}
    for trial in trials:
        by_case.setdefault(trial.case, []).append(trial)
    for case, tried in by_case.items():
        print(case)
        for trial in sorted(tried, key=lambda trial: -trial.rate)[:6]:
            print(f"    {trial.rate / 1e12:8.3f} T/s  {trial.config}", flush=True)
    return [trial for tried in by_case.values() for trial in tried]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--tune", nargs="+", default=[], choices=["decode", "extend"])
    parser.add_argument("--skip", nargs="+", default=[], choices=["checks", "speed"])
    parser.add_argument("--decode-only", action="store_true", help="time decode attention alone")
    parser.add_argument("--pool-blocks", type=int, default=1 << 16, help="64 MiB for 256 blocks")
    parser.add_argument("--out", help="where to write the result file")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_sms = 4
    if device == "cuda":
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    started = time.perf_counter()
    checks, figures, trials, copy = [], [], [], 0.0
    if "checks" not in args.skip:
        checks = run_checks(device, args.dry_run)
    if "speed" not in args.skip:
        figures, copy = run_speed(args, device, num_sms)
    if args.tune and device == "cuda":
        trials = run_tuning(args, num_sms)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    if args.out:
        write_result(
            args.out,
            arguments=vars(args),
            copy_bytes_per_second=copy,
            checks=[asdict(check) for check in checks],
            figures=[asdict(figure) for figure in figures],
            trials=[asdict(trial) for trial in trials],
        )
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
