"""Folders that are made once: whole or not at all, whatever stops the making.

$PAGEDCORE_CACHE or ~/.cache/pagedcore
    models/<key>/       a finished model folder
    models/.<key>.part/ one that is being made, or was when the machine stopped
    models/.<key>.lock  held by the process that makes it
    downloads/<key>/    what it is made of, until it is made
"""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pagedcore.errors import ModelError

logger = logging.getLogger(__name__)

VARIABLE = "PAGEDCORE_CACHE"


def cache_root() -> Path:
    """The folder that the user chose, or `~/.cache/pagedcore`."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "pagedcore"


def downloads(key: str) -> Path:
    """Where the files that `key` is made of stay between two attempts."""
    return cache_root() / "downloads" / key


def cached_folder(key: str, fill: Callable[[Path], None]) -> Path:
    """Return the folder `key`, made by `fill` if it is not there yet.

    Several processes may ask at once: one makes it, the others wait. Raises what `fill` raises,
    and ModelError, with the remedy, where the cache cannot be written.
    """
    models = cache_root() / "models"
    folder = models / key
    if folder.is_dir():
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{key}.lock"):
            if not folder.is_dir():
                _make(models, folder, fill)
    except OSError as error:
        raise ModelError(
            f"the cache {cache_root()} cannot be written ({error.strerror or error}). Free some "
            f"space or fix its permissions, or set {VARIABLE} to another folder."
        ) from error
    return folder


def ensure_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError, as a write would, unless `num_bytes` more fit on the disk of `folder`."""
    if num_bytes > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _make(models: Path, folder: Path, fill: Callable[[Path], None]) -> None:
    part = models / f".{folder.name}.part"
    if part.exists():  # left by a process that was killed
        shutil.rmtree(part)
    part.mkdir()
    try:
        fill(part)
        for path in part.iterdir():  # the folder is taken for whole from now on, even after a crash
            with path.open("rb") as file:
                os.fsync(file.fileno())
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which ends with the process at the latest."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching the same model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
