"""What tritonserver needs of the machine, and what one that was killed has left on it."""

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pagedcore.errors import ConfigError

_PREFIX = "pagedcore-"
_LOCK = "lock"
_SHARED_MEMORY = Path("/dev/shm")


def prepare_environment() -> None:
    """Set what PyTriton and tritonserver read from the environment; before `Triton(...)`.

    Raises ConfigError where Triton could not load this interpreter.
    """
    # Without it each response goes through a shared-memory store: gaps of up to 0.8 s.
    os.environ["PYTRITON_NO_TENSORSTORE"] = "1"
    # Triton's stub would otherwise find the distribution's libpython, not this interpreter's.
    paths = [_library_folder(), *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(dict.fromkeys(filter(None, paths)))


def is_prepared() -> bool:
    """Whether `prepare_environment` was called in this process or one before it."""
    paths = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return "PYTRITON_NO_TENSORSTORE" in os.environ and _library_folder() in paths


def _library_folder() -> str:
    """Where this interpreter's shared library is."""
    library = f"libpython{sysconfig.get_python_version()}.so.1.0"
    told = Path(sysconfig.get_config_var("LIBDIR") or "")
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    # A Python that was moved after it was built tells a folder that is not there.
    folders = [told, told / multiarch, Path(sys.base_prefix) / "lib"]
    for folder in folders:
        if (folder / library).exists():
            return str(folder)
    raise ConfigError(
        f"Triton needs a shared {library}, which is not in {told}: use a Python that was "
        "built with --enable-shared"
    )


@contextmanager
def temporary_workspace() -> Iterator[Path]:
    """A folder for tritonserver's files and sockets, which only its owner may enter.

    It is where PyTriton would make one: programs must be allowed to run from there. What servers
    have left that were killed is removed first, and their processes ended.
    """
    from pytriton.constants import PYTRITON_HOME

    home: Path = PYTRITON_HOME
    home.mkdir(parents=True, exist_ok=True)
    for left in home.glob(f"{_PREFIX}*"):
        _clear_up(left)
    with (
        tempfile.TemporaryDirectory(
            dir=home, prefix=f"{_PREFIX}{os.getpid()}-", ignore_cleanup_errors=True
        ) as folder,
        open(Path(folder) / _LOCK, "wb") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield Path(folder) / "workspace"
        finally:
            _remove_segments(os.getpid())


def _clear_up(folder: Path) -> None:
    """Remove a workspace whose server is gone; a server holds its lock as long as it lives."""
    with contextlib.suppress(OSError), open(folder / _LOCK, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for pid in processes_in(folder):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        _remove_segments(int(folder.name.split("-")[1]))


def _remove_segments(pid: int) -> None:
    """Remove shared memory that tritonserver has made for this process of PyTriton's."""
    for segment in _SHARED_MEMORY.glob(f"pytrtion{pid}-*"):  # so it is spelled
        segment.unlink(missing_ok=True)


def processes_in(folder: Path) -> dict[int, str]:
    """Processes whose program lies below a folder, whoever their parent is: ids and names."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program = (entry / "cmdline").read_bytes().split(b"\0")[0]
            if program.startswith(os.fsencode(folder) + b"/"):
                found[int(entry.name)] = os.fsdecode(program).rpartition("/")[2]
    return found
