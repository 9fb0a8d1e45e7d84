"""Show how far a download or a conversion has come."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Report = Callable[[int, int | None], None]
"""Is told how many bytes are done, and of how many, where that is known."""


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A bar on stderr while the block runs, or one log line where stderr is no terminal."""
    if not sys.stderr.isatty():
        logger.info("%s", what)
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        # Cut so that the line fits into 80 columns.
        task = bars.add_task(what if len(what) <= 36 else f"{what[:35]}…", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
