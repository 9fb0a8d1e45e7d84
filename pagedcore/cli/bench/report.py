"""Numbers of a benchmark: summaries, a table for people and JSON for programs."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pagedcore.errors import ConfigError

PERCENTILES = (10, 25, 50, 75, 90, 99)


def percentiles(values: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    """Percentiles by name, such as "50" and "99.9"; numpy's linear interpolation."""
    found = np.percentile(np.asarray(values, np.float64), wanted)
    return {f"{p:g}": float(value) for p, value in zip(wanted, found, strict=True)}


def show(title: str, rows: Mapping[str, float | int | str]) -> None:
    """Print names and numbers."""
    table = Table(title=title, show_header=False, title_justify="left", min_width=len(title))
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else str(value))
    Console().print(table)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of cells, whose first is a name."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, min_width=len(title))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def drawable(path: str) -> None:
    """Raise ConfigError, before anything is measured, where no chart can be drawn to `path`."""
    if not path.endswith(".png"):
        raise ConfigError(f"plot must name a file that ends in .png, not {path!r}")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'pagedcore[plots]'")


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON; raises ConfigError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the result to {path}: {error.strerror}") from None
    print(f"wrote {path}", file=sys.stderr)


def progress() -> Progress:
    """A progress bar on stderr, which leaves stdout to the result."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
