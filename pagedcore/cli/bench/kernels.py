"""`pagedcore bench kernels`: kernels, right first, then beside what the device can do."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.progress import Progress

from pagedcore.cli.bench.report import drawable, progress, save, show, show_table
from pagedcore.cli.flags import command, parameters, take
from pagedcore.errors import ConfigError
from pagedcore.plugins import choose, load_plugins

if TYPE_CHECKING:
    from pagedcore.execution.kernel_bench import Check, Figure, KernelBench, Trial, Unit

Item = TypeVar("Item")
PARTS = ("checks", "speed")
_BEST = 5
"""Settings that are shown of each case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What is measured."""

    backend: str = "triton"
    """Backend whose kernels are measured."""

    dry_run: bool = False
    """Take tiny shapes, on any device; without a GPU, in Triton's interpreter."""

    skip: tuple[str, ...] = ()
    """What to leave out: `checks` or `speed`."""

    tune: tuple[str, ...] = ()
    """Kernels whose settings are searched, too: `decode`, `extend` and `packed` of `triton`. What
    is best for `packed` is kept in the cache, and used from then on."""

    cache_gib: float = 16.0
    """Most memory for the keys and values that attention reads; large cases need much."""

    disable_plugin: tuple[str, ...] = ()
    """Plugins that are not loaded."""

    output_json: str | None = None
    """File for the result."""

    plot: str | None = None
    """File for a chart (PNG): each kernel's share of what the device can do."""

    def __post_init__(self) -> None:
        for part in self.skip:
            if part not in PARTS:
                raise ConfigError(f"skip may hold {' and '.join(PARTS)}, not {part!r}")
        if not self.cache_gib > 0:
            raise ConfigError(f"cache_gib must be above 0, not {self.cache_gib}")
        if self.plot is not None:
            drawable(self.plot)
            if "speed" in self.skip:
                raise ConfigError("--plot draws speeds, and --skip leaves them out: drop one")


@command(parameters(Benchmark, listed={"skip", "tune", "disable_plugin"}))
def kernels(**options: Any) -> int:
    """Check a backend's kernels, time them, and show rates beside what the device can do.

    Rates are in TB/s where memory limits a kernel, and in TFLOP/s where arithmetic does. The
    ceilings are those of a copy and of the library's matrix product, measured here and now. The
    status is 1 if a kernel is wrong.
    """
    wanted = Benchmark(**take(options, Benchmark))
    device, bench = _open(wanted)
    for kernel in wanted.tune:
        if kernel not in bench.tunable:
            names = ", ".join(bench.tunable) or "none"
            raise ConfigError(f"tune may hold {names} for {wanted.backend!r}, not {kernel!r}")
    with progress() as bar:
        checks = [] if "checks" in wanted.skip else _collect(bar, "checks", bench.checks())
        ceilings = dict(bench.ceilings())
        figures = [] if "speed" in wanted.skip else _collect(bar, "cases", bench.figures())
        trials = {name: _collect(bar, name, bench.trials(name)) for name in wanted.tune}
    _show(device, ceilings, checks, figures)
    for name, tried in trials.items():
        _show_trials(name, tried)
    if wanted.output_json:
        result = {
            "backend": wanted.backend,
            "device": device,
            "dry_run": wanted.dry_run,
            "ceilings": ceilings,
            "checks": [asdict(check) for check in checks],
            "figures": [asdict(figure) for figure in figures],
            "trials": {name: [asdict(t) for t in tried] for name, tried in trials.items()},
        }
        save(Path(wanted.output_json), result)
    if wanted.plot:
        from pagedcore.cli.bench.plot import draw_kernels

        draw_kernels(Path(wanted.plot), device, ceilings, figures)
    return 0 if all(check.passed for check in checks) else 1


def _open(wanted: Benchmark) -> tuple[str, "KernelBench"]:
    """The device's name, and what measures the backend's kernels there."""
    import torch

    from pagedcore.execution.devices import find_device
    from pagedcore.execution.kernel_bench import Measured

    if not torch.cuda.is_available():
        if not wanted.dry_run:
            raise ConfigError(
                "kernels are measured on an NVIDIA GPU, and torch finds none: go where there is "
                "one, or try it with --dry-run (tiny shapes, and figures without meaning)"
            )
        os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported
    device = find_device("auto")
    plugins = load_plugins(wanted.disable_plugin)
    ops = choose(plugins, "pagedcore_backends", wanted.backend)(str(device))
    if not isinstance(ops, Measured):
        raise ConfigError(
            f"the backend {wanted.backend!r} does not measure its kernels: name another with "
            "--backend"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return name, ops.kernel_bench(small=wanted.dry_run, cache_gib=wanted.cache_gib)


def _collect(bar: Progress, what: str, items: Iterable[Item]) -> list[Item]:
    """Take all items, and show how many there are so far."""
    task = bar.add_task(what, total=None)
    found = []
    for item in items:
        found.append(item)
        bar.advance(task)
    bar.remove_task(task)
    return found


def _show(
    device: str,
    ceilings: Mapping["Unit", float],
    checks: Sequence["Check"],
    figures: Sequence["Figure"],
) -> None:
    rows: dict[str, Any] = {
        "copy (TB/s)": f"{ceilings['B/s'] / 1e12:.3f}",
        "matrix product (TFLOP/s)": f"{ceilings['FLOP/s'] / 1e12:.1f}",
    }
    if checks:
        rows["checks passed"] = f"{sum(check.passed for check in checks)} of {len(checks)}"
    show(f"Ceilings of {device}", rows)
    for check in checks:
        if not check.passed:
            show("Wrong", {check.name: f"{check.error:.2e}, allowed {check.limit:.0e}"})
    for kernel in dict.fromkeys(figure.kernel for figure in figures):
        rows_of = [_row(figure, ceilings) for figure in figures if figure.kernel == kernel]
        show_table(kernel, ("case", "µs", "rate", "of ceiling"), rows_of)


def _row(figure: "Figure", ceilings: Mapping["Unit", float]) -> list[str]:
    return [
        figure.case,
        f"{figure.time.median:,.1f}",
        f"{figure.rate / 1e12:.3f} T{figure.unit}",
        f"{figure.rate / ceilings[figure.unit]:.1%}",
    ]


def _show_trials(name: str, trials: Sequence["Trial"]) -> None:
    """The best settings of each case."""
    by_case: dict[str, list[Trial]] = {}
    for trial in trials:
        by_case.setdefault(trial.case, []).append(trial)
    rows = []
    for case, tried in by_case.items():
        rows.append([case, ""])
        for trial in sorted(tried, key=lambda trial: -trial.rate)[:_BEST]:
            setting = re.sub(r"^\w+\((.*)\)$", r"\1", str(trial.config))
            rows.append([f"  {setting}", f"{trial.rate / 1e12:.3f}"])
    show_table(f"Settings of {name}, the best first", ("case and setting", "T/s"), rows)
