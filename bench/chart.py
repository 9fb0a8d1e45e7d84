"""Draw docs/performance.png: tokens per second beside the peer's, from the results of h200.py.

    python bench/chart.py
    python bench/chart.py --results bench/results/h200*.json --out docs/performance.png

Needs an installation with matplotlib (`pagedcore[plots]`). Of a shape and a workload that stand in
several files, the latest counts. The same files make the same chart.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from pagedcore.cli.bench.plot import BLUE, GREY, ORANGE, chart
from pagedcore.errors import PagedcoreError

ROOT = Path(__file__).parents[1]
PEER = "vLLM 0.26.0"

WORKLOADS = {
    "nano": "nano: 256 requests, mixed",
    "b1": "decode, 1 sequence",
    "b32": "decode, 32 sequences",
    "b256": "decode, 256 sequences",
    "burst": "burst: 1,024 at once",
    "prefill": "prefill: 16 x 4,096",
}
SHAPES = {
    "qwen3-0.6b": "Qwen3-0.6B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "llama-3.1-8b-fp8": "Llama-3.1-8B, FP8",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
}
TIE = 0.03
"""Ratios nearer to 1 than this are ties (docs/performance.md)."""


@dataclass(frozen=True)
class Figure:
    """Tokens per second of one workload, and where they come from."""

    rate: float
    peer: float
    commit: str

    @property
    def ratio(self) -> float:
        return self.rate / self.peer


def read(paths: list[Path]) -> tuple[str, dict[str, dict[str, Figure]]]:
    """The GPU's name, and figures by shape and workload, in the order in which they are drawn.

    Files without shapes are passed over; a shape without any figure that has a peer is left out.
    """
    results = [json.loads(path.read_text()) for path in sorted(paths)]
    results = sorted((r for r in results if "shapes" in r), key=lambda r: r["date"])
    if not results:
        raise SystemExit("no result of bench/h200.py is among the files")
    cards = {r["gpu"]["name"] for r in results if r.get("gpu")}
    if len(cards) > 1:
        raise SystemExit(f"the results are of several kinds of GPU: {', '.join(sorted(cards))}")
    found: dict[str, dict[str, Figure]] = {shape: {} for shape in SHAPES}
    for result in results:
        for shape, figures in result["shapes"].items():
            for name, figure in figures.items():
                if name in WORKLOADS and figure["peer"]:
                    rate, commit = figure["tokens_per_second"], result["commit"]
                    found.setdefault(shape, {})[name] = Figure(rate, figure["peer"], commit)
    ordered = {
        shape: {name: of_shape[name] for name in WORKLOADS if name in of_shape}
        for shape, of_shape in found.items()
        if of_shape
    }
    if not ordered:
        raise SystemExit("no figure in the files has a peer to compare with")
    return cards.pop() if cards else "one GPU", ordered


def draw(out: Path, card: str, found: dict[str, dict[str, Figure]]) -> None:
    """A panel for each shape, a bar for each workload."""
    columns = min(2, len(found))
    sizes = [len(of_shape) for of_shape in found.values()]
    heights = [max(sizes[i : i + columns]) for i in range(0, len(sizes), columns)]
    size = (5.9 * columns, 0.8 + sum(0.7 + 0.4 * height for height in heights))
    most = max(figure.ratio for of_shape in found.values() for figure in of_shape.values())
    title = f"pagedcore beside {PEER}, the same work on {card}"
    with chart(out, title, size) as figure:
        panels = figure.subplots(
            len(heights), columns, sharex=True, squeeze=False, height_ratios=heights
        )
        for i, (shape, of_shape) in enumerate(found.items()):
            axes, empty = panels.flat[i], heights[i // columns] - len(of_shape)
            draw_panel(axes, SHAPES.get(shape, shape), of_shape)
            axes.set_ylim(-empty - 0.6, len(of_shape) - 0.4)
            axes.set_xlim(0, most * 1.85)
            axes.set_xticks(range(1 + math.ceil(most)))
        for axes in panels.flat[len(found) :]:
            axes.set_visible(False)
        figure.supxlabel(
            f"tokens per second, as a multiple of {PEER}'s; within {TIE:.0%} (grey) is a tie",
            fontsize=9.5,
        )


def draw_panel(axes, title: str, of_shape: dict[str, Figure]) -> None:
    names = list(of_shape)[::-1]
    ratios = [of_shape[name].ratio for name in names]
    colors = [BLUE if r >= 1 + TIE else ORANGE if r <= 1 - TIE else GREY for r in ratios]
    axes.barh([WORKLOADS[name] for name in names], ratios, color=colors, height=0.62)
    for place, name in enumerate(names):
        one = of_shape[name]
        axes.annotate(
            f"{one.ratio:.2f}x", (one.ratio, place), (5, 0), textcoords="offset points",
            va="center", fontweight="bold",
        )  # fmt: skip
        axes.annotate(
            f"{whole(one.rate)} against {whole(one.peer)}", (one.ratio, place), (42, 0),
            textcoords="offset points", va="center", color=GREY, fontsize=8.5,
        )  # fmt: skip
    axes.axvline(1.0, color="#3b3f46", linewidth=1.1)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_title(title)


def whole(rate: float) -> str:
    """Rounded as a reader would, halves up."""
    return f"{math.floor(rate + 0.5):,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", nargs="+", type=Path, help="files of bench/h200.py")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.png")
    args = parser.parse_args()
    card, found = read(args.results or list((ROOT / "bench" / "results").glob("h200*.json")))
    try:
        draw(args.out, card, found)
    except PagedcoreError as error:
        raise SystemExit(str(error)) from None
    commits = sorted({one.commit for of_shape in found.values() for one in of_shape.values()})
    print(f"wrote {args.out}: {sum(map(len, found.values()))} figures of {', '.join(commits)}")


if __name__ == "__main__":
    sys.exit(main())
