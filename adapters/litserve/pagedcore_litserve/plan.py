"""What the processes of a mount know of each other: plain data, which LitServe sends to workers."""

import atexit
import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pagedcore.config import EngineConfig
from pagedcore.server_config import ServerConfig


def join_log() -> None:
    """Let LitServe's own messages, which are text on standard output, go where all others go."""
    log = logging.getLogger("litserve")
    for handler in tuple(log.handlers):
        log.removeHandler(handler)
    log.propagate = True


def _private_folder() -> str:
    """A folder that only its owner may enter, removed by the process that made it."""
    folder = tempfile.mkdtemp(prefix="pagedcore-")
    atexit.register(_remove_own, folder, os.getpid())
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One `PagedLitAPI`: its settings, and where its processes meet."""

    engine: EngineConfig
    server: ServerConfig
    build: str
    """What makes the engine; see `pagedcore.engine.start.BUILD`."""

    folder: str = field(default_factory=_private_folder)
    main_pid: int = field(default_factory=os.getpid)

    def address(self, worker_id: int) -> str:
        """The engine socket of one worker."""
        return f"{self.folder}/engine-{worker_id}.sock"

    @property
    def failures(self) -> str:
        """Where the main process, if it supervises, takes messages of a failed start."""
        return f"{self.folder}/failures.sock"

    def remove_folder(self) -> None:
        """Remove the folder, unless an engine's socket is still in it."""
        Path(self.failures).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)


def _remove_own(folder: str, owner_pid: int) -> None:
    """At exit; a fork inherits exit hooks, and must not follow them."""
    if os.getpid() == owner_pid:
        for path in (*Path(folder).glob("*.sock"), Path(folder)):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
