"""Seed bugs into copies of the scheduler, and see how soon the random driver notices each.

    python tests/core/scheduling/mutants.py --out bench/results/mutants.json

The bugs are those of `seeded_bugs.py`. Prints for each its name, after how many operations it was
killed, and by what; the exit status is 0 when at most one in twenty survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from seeded_bugs import MUTANTS, Mutant

ROOT = Path(__file__).parents[3]
DRIVER = Path(__file__).with_name("random_driver.py")
TIMEOUT_S = 240


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    killer: str | None
    operations: int
    seconds: float


def attack(mutant: Mutant, operations: int, seed: int) -> Outcome:
    """Run the driver against a copy of the core with one bug in it."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        core = Path(folder, "pagedcore")
        shutil.copytree(ROOT / "pagedcore", core, ignore=shutil.ignore_patterns("__pycache__"))
        path = core / "scheduling" / f"{mutant.module}.py"
        path.write_text(mutant.apply(path.read_text()))
        killer, done = drive(folder, operations, seed)
    return Outcome(mutant, killer, done, time.perf_counter() - started)


def drive(folder: str, operations: int, seed: int) -> tuple[str | None, int]:
    """What the driver found wrong, if anything, and in which operation."""
    command = [sys.executable, str(DRIVER), "--operations", str(operations), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=folder
        )
    except subprocess.TimeoutExpired:
        return f"did not end in {TIMEOUT_S} s", operations
    if run.returncode == 0:
        return None, operations
    if run.returncode < 0:
        return f"ended by signal {-run.returncode}", operations
    found = re.search(r"operation (\d+)", run.stdout)
    lines = run.stderr.strip().splitlines() or ["blocks leaked"]
    if not found:
        raise SystemExit(f"the driver did not run: {lines[-1]}")
    return lines[-1].removeprefix("AssertionError: "), int(found[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=100_000, help="most, for each mutant")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="mutants whose names contain this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.only in mutant.name]
    outcomes = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for outcome in pool.map(lambda m: attack(m, args.operations, args.seed), chosen):
            outcomes.append(outcome)
            killer = outcome.killer or "SURVIVED"
            name = outcome.mutant.name
            print(f"{name:56} {outcome.operations:7}  {killer[:100]}", flush=True)
    killed = sum(outcome.killer is not None for outcome in outcomes)
    print(f"{killed} of {len(outcomes)} killed")
    if args.out:
        write(args.out, args.operations, args.seed, outcomes)
    return 0 if len(outcomes) - killed <= len(outcomes) // 20 else 1


def write(path: Path, operations: int, seed: int, outcomes: list[Outcome]) -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    from machine import write_result

    write_result(
        path,
        operations_at_most=operations,
        seed=seed,
        killed=sum(outcome.killer is not None for outcome in outcomes),
        mutants=[
            {
                "name": outcome.mutant.name,
                "module": outcome.mutant.module,
                "killer": outcome.killer,
                "operations": outcome.operations,
                "seconds": round(outcome.seconds, 1),
            }
            for outcome in outcomes
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
