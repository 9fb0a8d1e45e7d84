"""Charts of results, as PNG. matplotlib is imported here alone, when a chart was asked for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from pagedcore.cli.bench.client import Outcome
from pagedcore.cli.bench.metrics import METRICS, values_ms
from pagedcore.cli.bench.timeline import running_requests, token_rates
from pagedcore.errors import ConfigError

if TYPE_CHECKING:
    from pagedcore.execution import kernel_bench

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2b6cb0", "#dd7d26", "#2f855a", "#805ad5", "#8a8f98"
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#b8bcc4",
    "axes.grid": True,
    "axes.labelcolor": "#3b3f46",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9.5,
    "grid.color": "#e4e6ea",
    "legend.frameon": False,
    "xtick.color": "#3b3f46",
    "ytick.color": "#3b3f46",
}


@contextmanager
def chart(path: Path, title: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of `size` inches, which is written at the end; raises ConfigError if it cannot be.

    The same data make the same file.
    """
    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield figure
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="png", metadata={"Software": None})
        except OSError as error:
            raise ConfigError(f"cannot write the chart to {path}: {error.strerror}") from None


def draw_serve(path: Path, title: str, outcomes: Sequence[Outcome]) -> None:
    """Latencies by percentile, and over time what the server did."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    with chart(path, title, (11, 6.2)) as figure:
        grid = figure.add_gridspec(3, 2, width_ratios=(1.15, 1))
        _percentiles(figure.add_subplot(grid[:, 0]), done)
        first = figure.add_subplot(grid[0, 1])
        others = [figure.add_subplot(grid[row, 1], sharex=first) for row in (1, 2)]
        start = min(outcome.started for outcome in done)
        first.plot(
            [outcome.started - start for outcome in done],
            [1000 * outcome.time_to_first for outcome in done],
            linestyle="none", marker="o", markersize=3.5, alpha=0.6, color=BLUE, markeredgewidth=0,
            clip_on=False,
        )  # fmt: skip
        first.set_title("Time to first token of each request (ms)")
        others[0].set_title("Requests that run")
        moments, running = running_requests(done)
        others[0].step(moments, running, where="post", color=PURPLE, linewidth=1.3)
        bin_s = min(1.0, moments[-1] / 40)
        others[1].step(*token_rates(done, bin_s), where="post", color=GREEN, linewidth=1.3)
        others[1].set_title("Tokens per second")
        others[1].set_xlabel("seconds since the first request was sent")
        for axes in (first, *others):
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
        for axes in (first, others[0]):
            axes.tick_params(labelbottom=False)


def _percentiles(axes: Any, done: Sequence[Outcome]) -> None:
    """Each metric as a line from its smallest value to its largest."""
    colors = dict(zip(METRICS, (BLUE, GREEN, ORANGE, PURPLE), strict=True))
    wanted = np.linspace(0, 100, 401)
    for name, color in colors.items():
        values = values_ms(done, name)
        if not values:
            continue
        p50, p99 = np.percentile(values, [50, 99])
        label = f"{name.upper()}: p50 {_short(p50)}, p99 {_short(p99)}"
        axes.plot(wanted, np.percentile(values, wanted), color=color, linewidth=2, label=label)
        axes.plot([50, 99], [p50, p99], linestyle="none", marker="o", markersize=4.5, color=color)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlim(0, 101)
    axes.set_xticks([0, 25, 50, 75, 90, 99])
    axes.set_xlabel("percentile")
    axes.set_title("Latency (ms)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    axes.margins(y=0.08)


def _short(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_latency(path: Path, title: str, latencies: Sequence[float]) -> None:
    """Each batch, and where the middle and the tail lie."""
    with chart(path, title, (8, 4)) as figure:
        axes = figure.subplots()
        axes.plot(
            range(1, len(latencies) + 1), latencies, linestyle="none", marker="o", color=BLUE,
        )  # fmt: skip
        for percentile, color in ((50, GREEN), (99, ORANGE)):
            value = float(np.percentile(latencies, percentile))
            label = f"p{percentile}: {value:.4g} s"
            axes.axhline(value, color=color, linewidth=1.4, label=label)
        axes.set_title("Seconds of each batch")
        axes.set_xlabel("batch")
        axes.set_ylim(0, 1.25 * max(latencies))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower right", ncols=2)


def draw_startup(path: Path, title: str, phases: Mapping[str, Mapping[str, float]]) -> None:
    """A bar for each kind of start, made of its phases in seconds; it is ready before `graphs`."""
    names = list(dict.fromkeys(name for of_kind in phases.values() for name in of_kind))
    colors = dict(zip(names, (GREY, BLUE, "#63a4dd", GREEN, ORANGE, PURPLE), strict=False))
    with chart(path, title, (9, 1.4 + 0.8 * len(phases))) as figure:
        axes = figure.subplots()
        kinds = list(phases)[::-1]
        ends = np.zeros(len(kinds))
        for name in names:
            seconds = np.array([phases[kind].get(name, 0.0) for kind in kinds])
            axes.barh(kinds, seconds, left=ends, color=colors.get(name), label=name, height=0.6)
            ends += seconds
        for kind, end in zip(kinds, ends, strict=True):
            ready = end - phases[kind].get("graphs", 0.0)
            axes.annotate(
                f"ready after {ready:.2f} s", (end, kind), (4, 0),
                textcoords="offset points", va="center",
            )  # fmt: skip
        axes.set_xlim(0, 1.25 * float(ends.max()))
        axes.set_xlabel("seconds")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside lower center", ncols=len(names))


def draw_kernels(
    path: Path,
    device: str,
    ceilings: Mapping["kernel_bench.Unit", float],
    figures: Sequence["kernel_bench.Figure"],
) -> None:
    """A dot for each case: its share of what the device can do."""
    kernels = list(dict.fromkeys(figure.kernel for figure in figures))[::-1]
    copy, product = ceilings["B/s"] / 1e12, ceilings["FLOP/s"] / 1e12
    title = f"Kernels on {device}: copy {copy:.3g} TB/s, matrix product {product:.4g} TFLOP/s"
    colors: dict[kernel_bench.Unit, str] = {"B/s": BLUE, "FLOP/s": ORANGE}
    with chart(path, title, (9, 1.8 + 0.42 * len(kernels))) as figure:
        axes = figure.subplots()
        for unit, color in colors.items():
            points = [f for f in figures if f.unit == unit]
            axes.plot(
                [f.rate / ceilings[unit] for f in points],
                [kernels.index(f.kernel) for f in points],
                linestyle="none", marker="o", markersize=6, alpha=0.6, markeredgewidth=0,
                color=color, label="of the copy" if unit == "B/s" else "of the product",
            )  # fmt: skip
        axes.axvline(1.0, color=GREY, linewidth=1.2)
        axes.set_yticks(range(len(kernels)), kernels)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("share of what the device can do, one dot for each case")
        figure.legend(loc="outside lower right", ncols=2)
