"""`pagedcore bench startup`: seconds until a new process can answer, with and without caches."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedcore.cli.bench.report import (
    PERCENTILES,
    drawable,
    percentiles,
    progress,
    save,
    show_table,
)
from pagedcore.cli.flags import command, engine_parameters, parameters, take
from pagedcore.config import DEFAULT_MODEL, EngineConfig
from pagedcore.errors import ConfigError, ModelError

_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What is measured."""

    num_iters_cold: int = 3
    """Starts with an empty cache of compiled kernels."""

    num_iters_warmup: int = 1
    """Starts that fill the cache and are not counted."""

    num_iters_warm: int = 3
    """Starts with the filled cache."""

    output_json: str | None = None
    """File for the result."""

    plot: str | None = None
    """File for a chart (PNG) of the phases."""

    def __post_init__(self) -> None:
        if self.plot is not None:
            drawable(self.plot)
        if min(self.num_iters_cold, self.num_iters_warmup, self.num_iters_warm) < 0:
            raise ConfigError("numbers of starts must not be negative")
        if self.num_iters_cold + self.num_iters_warm < 1:
            raise ConfigError("num_iters_cold and num_iters_warm are both 0: nothing to measure")


@command([*parameters(Benchmark), *engine_parameters()])
def startup(model: str = DEFAULT_MODEL, **options: Any) -> int:
    """Measure the seconds until a new process can answer, and where they go.

    Phases: `import` (with the interpreter's own start), `config` (plugins, model files, text side),
    `weights`, `profile` (memory, and the cache), together `total`; `graphs` are captured when the
    engine is ready, and come on top. Files of the model come from the operating system's cache in
    both cases, once they were read.
    """
    wanted = Benchmark(**take(options, Benchmark))
    EngineConfig.from_options(model=model, **options)  # complains before a process is started
    order = json.dumps({"model": model, **options})
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        total = wanted.num_iters_cold + wanted.num_iters_warmup + wanted.num_iters_warm
        task = bar.add_task("starts", total=total)
        kinds = {"cold": (0, wanted.num_iters_cold)}
        kinds["warm"] = (wanted.num_iters_warmup, wanted.num_iters_warm)
        for kind, (num_ignored, num_counted) in kinds.items():
            starts = []
            for i in range(num_ignored + num_counted):
                cache = Path(folder, f"cold-{i}" if kind == "cold" else "warm")
                starts.append(_start(order, cache))
                bar.advance(task)
            if num_counted:
                result |= _summary(kind, starts[num_ignored:])
    _show(model, [kind for kind in kinds if f"{kind}_phases" in result], result)
    if wanted.output_json:
        save(Path(wanted.output_json), result)
    if wanted.plot:
        from pagedcore.cli.bench.plot import draw_startup

        bars = {
            f"{kind} cache": {k: v for k, v in result[f"{kind}_phases"].items() if k != "total"}
            for kind in kinds
            if f"{kind}_phases" in result
        }
        draw_startup(Path(wanted.plot), f"Start of {model}", bars)
    return 0


def _show(model: str, kinds: list[str], result: dict[str, Any]) -> None:
    """A column for each kind of start: its phases, then how much the whole varies."""
    columns = ["seconds", *(f"{kind} cache" for kind in kinds)]
    phases = [result[f"{kind}_phases"] for kind in kinds]
    rows = [[name, *(f"{of_kind[name]:.2f}" for of_kind in phases)] for name in phases[0]]
    for percentile in map(str, PERCENTILES):
        totals = [result[f"{kind}_startup_percentiles"][percentile] for kind in kinds]
        rows.append([f"total, p{percentile}", *(f"{total:.2f}" for total in totals)])
    show_table(f"Start of {model}", columns, rows)


def _start(order: str, cache: Path) -> tuple[float, dict[str, float]]:
    """Start one process: seconds until it was ready, and those of each phase."""
    environment = {**os.environ, **{name: str(cache) for name in _CACHES}}
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "pagedcore.cli.bench.start_once"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(order)
        process.stdin.close()
        ready = process.stdout.readline()
        seconds = time.perf_counter() - started
        prepared = process.stdout.readline()
    if not ready or not prepared:
        raise ModelError("the engine did not start; the reason stands above")
    own = json.loads(ready)
    phases = {"import": seconds - sum(own.values()), **own, "total": seconds}
    return seconds, {**phases, **json.loads(prepared)}


def _summary(kind: str, starts: list[tuple[float, dict[str, float]]]) -> dict[str, Any]:
    times = [seconds for seconds, _ in starts]
    phases = {
        name: sum(phases.get(name, 0.0) for _, phases in starts) / len(starts)
        for name in starts[0][1]
    }
    return {
        f"avg_{kind}_startup_time": sum(times) / len(times),
        f"{kind}_startup_times": times,
        f"{kind}_startup_percentiles": percentiles(times, PERCENTILES),
        f"{kind}_phases": phases,
    }
