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
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
