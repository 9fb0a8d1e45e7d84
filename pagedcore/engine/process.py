"""An engine in a process of its own, which lives no longer than the process that started it.

The child is a plain `python -m pagedcore.engine.process`, so no program needs a `__main__` guard.
What it shall do comes as msgpack through its standard input, which then stays open as a death pipe:
its end, orderly or not, ends the child. How the start went comes back through another pipe.
"""

import atexit
import contextlib
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, Self

import msgspec
from msgspec import Struct

from pagedcore.config import EngineConfig, Usage
from pagedcore.engine.info import EngineInfo
from pagedcore.engine.server import EngineServer
from pagedcore.engine.start import BUILD, StartFailure, build_by_name
from pagedcore.logs import configure_logs

__all__ = ["BUILD", "STOP_S", "EngineProcess"]

logger = logging.getLogger("pagedcore.engine.process")  # as __main__ too

STOP_S = 10.0
"""Seconds that an engine has to end in order."""


class _Job(Struct, frozen=True):
    """What the child shall do."""

    config: EngineConfig
    address: str
    folder: str | None
    usage: Usage
    build: str
    status_fd: int
    parent_pid: int


class _Ready(Struct, tag="ready", frozen=True):
    """The child's engine is loaded, and front ends can connect."""

    info: EngineInfo


class EngineProcess:
    """Starts an `EngineServer` in a child process, and ends it.

        with EngineProcess(config) as process:
            client = EngineClient(process.address)

    The child ignores SIGINT and SIGTERM: this process decides when it ends, by `stop` or by
    ending itself, in whatever way. Its log goes to standard error.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        address: str | None = None,
        owns_folder: bool = False,
        usage: Usage = "serve",
        build: str = BUILD,
    ) -> None:
        """Start; the model loads in the child while this goes on. See `wait_ready`.

        :param address: path of the socket; by default in a new folder that `stop` removes.
        :param owns_folder: whether the folder of a given `address` is removed, too.
        :param build: what makes the engine, as module:function; see `BUILD`.
        """
        self._folder: str | None = None
        if address is None:
            self._folder = tempfile.mkdtemp(prefix="pagedcore-")
        elif owns_folder:
            self._folder = os.path.dirname(address)
        self.address = address or f"{self._folder}/engine.sock"
        self._owner_pid = os.getpid()
        self._outcome: _Ready | StartFailure | None = None
        self._lock = threading.Lock()
        reader, writer = os.pipe()
        self._status: IO[bytes] = open(reader, "rb", buffering=0)  # noqa: SIM115  # see `stop`
        try:
            # Without -P, files in the working directory would hide modules, in the child only.
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "pagedcore.engine.process"],
                stdin=subprocess.PIPE,
                pass_fds=[writer],
            )
        finally:
            os.close(writer)
        atexit.register(self.stop)
        job = _Job(config, self.address, self._folder, usage, build, writer, self._owner_pid)
        with contextlib.suppress(BrokenPipeError):  # it has ended: `wait_ready` says how
            self._stdin.write(_frame(job))
            self._stdin.flush()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs, be it ready or not."""
        return self._child.poll() is None

    def wait_ready(self, timeout_s: float | None = None) -> EngineInfo:
        """Wait until the engine is loaded and front ends can connect.

        Raises what the start failed with (ConfigError, ModelError, PluginError, UnknownNameError),
        EngineDeadError for any other end, and TimeoutError; waiting again is possible then.
        """
        with self._lock:
            if self._outcome is None:
                self._outcome = self._receive(timeout_s)
        match self._outcome:
            case _Ready(info=info):
                return info
            case StartFailure() as failure:
                raise failure.exception()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until the child has ended, and return its exit status; raises TimeoutError."""
        try:
            return self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the engine process has not ended in {timeout_s} s") from None

    def stop(self) -> None:
        """End the engine: in order, or after `STOP_S` by force. Calling it again does nothing.

        Front ends get EngineDeadError for what is in flight: drain before. In a fork of the
        process that started the engine, it does nothing.
        """
        if os.getpid() != self._owner_pid:
            return
        atexit.unregister(self.stop)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            logger.warning("the engine process did not end in order and is killed")
            self._child.kill()
            self._child.wait()
        with self._lock:
            self._status.close()
            self._outcome = self._outcome or StartFailure("", "the engine was stopped")
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._child.stdin is not None
        return self._child.stdin

    def _receive(self, timeout_s: float | None) -> _Ready | StartFailure:
        if not select.select([self._status], [], [], timeout_s)[0]:
            raise TimeoutError(f"the engine is not ready after {timeout_s} s")
        outcome: _Ready | StartFailure | None = _read_frame(self._status, _Ready | StartFailure)
        if outcome is not None:
            return outcome
        status = self._child.wait(STOP_S)
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return StartFailure("", f"the engine process ended with {how} before it was ready")


def _frame(message: Struct) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(4, "little") + data


def _read_frame(stream: IO[bytes], kind: Any) -> Any:
    """One message, or None where the stream ends before it."""
    data = b""
    wanted = 4
    while len(data) < wanted:
        piece = stream.read(wanted - len(data))
        if not piece:
            return None
        data += piece
        if len(data) == 4:
            wanted += int.from_bytes(data, "little")
    return msgspec.msgpack.decode(data[4:], type=kind)


# The child:


def main() -> int:
    """Do the job that standard input tells, until the parent ends; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    configure_logs()
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        job: _Job | None = _read_frame(stdin, _Job)
    if job is None:
        return 1
    os.set_inheritable(job.status_fd, False)
    parent = _ParentWatch(job)
    try:
        engine = build_by_name(job.build, job.config, job.usage)
        server = EngineServer(engine, job.address, on_stuck=lambda: os._exit(1))
        parent.when_gone(server.stop)  # before there is a socket, which only `serve` removes
        server.listen()
    except Exception as error:
        _tell(job, StartFailure.of(error))
        return 1
    _tell(job, _Ready(engine.info))
    try:
        server.serve()
    except Exception:
        logger.exception("the engine has failed")
        return 1
    finally:
        engine.shutdown()
        _remove_folder(job)
    return 0


def _tell(job: _Job, outcome: _Ready | StartFailure) -> None:
    """Tell the parent how the start went, if it is still there."""
    with contextlib.suppress(BrokenPipeError), open(job.status_fd, "wb") as status:
        status.write(_frame(outcome))


def _remove_folder(job: _Job) -> None:
    """Remove the folder made for the socket: the parent may not be there any more to do it."""
    if job.folder is not None:
        shutil.rmtree(job.folder, ignore_errors=True)


def _wait_for_end(parent_pid: int) -> None:
    """Wait until standard input ends, or the parent does."""
    try:
        parent = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        return
    if os.getppid() == parent_pid:  # and not a later process of the same id
        select.select([0, parent], [], [])


class _ParentWatch:
    """Ends this process when the parent closes our standard input, or is gone.

    Both are watched: a fork of the parent holds the pipe open, even when the parent is killed.
    """

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._stop: Callable[[], None] | None = None
        threading.Thread(target=self._watch, name="pagedcore-parent", daemon=True).start()

    def when_gone(self, stop: Callable[[], None]) -> None:
        """From now on end in order, by `stop`; before, nothing is lost by ending at once."""
        with self._lock:  # not returned when the parent is gone already
            self._stop = stop

    def _watch(self) -> None:
        _wait_for_end(self._job.parent_pid)
        with self._lock:
            if self._stop is not None:
                self._stop()
                threading.Event().wait(STOP_S / 2)
            _remove_folder(self._job)
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
