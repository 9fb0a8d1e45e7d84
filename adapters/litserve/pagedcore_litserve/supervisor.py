"""The main process beside LitServe: signals, workers that die, API servers that end."""

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any, Self

import msgspec

from pagedcore.engine.start import StartFailure
from pagedcore.errors import EngineDeadError, PagedcoreError
from pagedcore_litserve.plan import Plan, join_log

logger = logging.getLogger("pagedcore.server")

MAX_DEATHS = 3
"""Deaths of workers within `WINDOW_S` after which the server ends: they would go on for ever."""

WINDOW_S = 600.0

_LOOK_S = 0.2
_START_S = 5.0
"""Seconds from the first API server, which are forked one after another, to the last."""

_LAST_WORDS_S = 12.0
"""Seconds beyond the drain's limit after which an API server is killed."""

_MAX_DATAGRAM = 1 << 16


class Supervisor:
    """Watches one LitServer from a thread; a context manager around its `run`.

    A signal ends the server in order: API servers drain, all at the same time and with the port
    open; LitServe then stops what is left. A second signal does not wait. A model that cannot be
    served, a worker that dies again and again, and an API server that ends end it as well.
    """

    def __init__(
        self, lit_server: Any, plans: list[Plan], num_api_servers: int | None = None
    ) -> None:
        """`plans` are those of the server's `PagedLitAPI`s; `num_api_servers` is LitServe's."""
        self.error: PagedcoreError | None = None
        """Why the server has ended by itself."""
        self._lit_server = lit_server
        self._plans = plans
        self._pid = os.getpid()
        self._num_signals = 0
        self._num_handled = 0
        self._interrupts = False
        self._deadline: float | None = None
        self._num_api_servers = num_api_servers
        self._api_servers: set[BaseProcess] = set()
        self._first_seen: float | None = None
        self._workers: set[BaseProcess] = set()
        self._dead: set[BaseProcess] = set()
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._over = threading.Event()
        self._failures: list[socket.socket] = []
        self._wake: tuple[socket.socket, socket.socket] = socket.socketpair()
        self._handlers: dict[int, Any] = {}
        self._thread = threading.Thread(target=self._watch, name="pagedcore-main", daemon=True)

    def __enter__(self) -> Self:
        for plan in self._plans:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            link.bind(plan.failures)
            self._failures.append(link)
        for end in self._wake:
            end.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._on_signal)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End whatever LitServe has left."""
        self._interrupts = False
        self._over.set()
        self._notify()
        self._thread.join()
        manager = self._lit_server.transport_config.manager
        if manager is not None:
            manager.shutdown()  # again does nothing
        _end_children()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for link in (*self._failures, *self._wake):
            link.close()
        for plan in self._plans:
            plan.remove_folder()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # API servers inherit this handler, and uvicorn calls it
            return
        if self._interrupts:
            self._interrupts = False
            raise KeyboardInterrupt
        self._num_signals += 1
        self._notify()

    def _notify(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is awake
            self._wake[1].send(b"!")

    def _watch(self) -> None:
        while not self._over.is_set():
            for link in select.select([self._wake[0], *self._failures], [], [], _LOOK_S)[0]:
                data = link.recv(_MAX_DATAGRAM)
                if link is not self._wake[0]:
                    self._fail(msgspec.msgpack.decode(data, type=StartFailure).exception())
            while self._num_handled < self._num_signals:
                self._num_handled += 1
                self._end_api_servers()
            self._look()

    def _look(self) -> None:
        self._api_servers |= _running_api_servers()
        if self._api_servers and any(plan.server.log_format == "json" for plan in self._plans):
            join_log()  # LitServe's `run` has set its own up by now
        alive = [process for process in self._api_servers if process.is_alive()]
        if self._deadline is None:
            self._look_at_workers()
            if len(alive) < self._num_expected():
                self._fail(EngineDeadError("an API server has ended unexpectedly"))
            return
        if time.monotonic() > self._deadline:
            for process in alive:
                process.kill()
        if not alive:
            self._leave()

    def _num_expected(self) -> int:
        """API servers that there should be; one may have ended before it was ever seen."""
        if not self._api_servers:
            return 0
        now = time.monotonic()
        self._first_seen = self._first_seen or now
        if now - self._first_seen < _START_S:
            return len(self._api_servers)
        workers = len(getattr(self._lit_server, "inference_workers", ()))  # LitServe's default
        return max(len(self._api_servers), self._num_api_servers or workers)

    def _look_at_workers(self) -> None:
        self._workers |= set(getattr(self._lit_server, "inference_workers", ()))
        # LitServe may have replaced a dead one already, or not yet.
        dead = {process for process in self._workers - self._dead if not process.is_alive()}
        self._dead |= dead
        for process in dead:
            now = time.monotonic()
            status = process.exitcode
            again = self._lit_server.restart_workers and self._api_servers
            if not again:
                self._fail(EngineDeadError(f"a worker has ended with exit status {status}"))
            elif len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < WINDOW_S:
                self._fail(
                    EngineDeadError(
                        f"workers have ended {MAX_DEATHS + 1} times within {WINDOW_S:g} s, the "
                        f"last time with exit status {status}: they are not started again"
                    )
                )
            else:
                logger.error("a worker has ended with exit status %s; it is started again", status)
            self._deaths.append(now)

    def _fail(self, error: PagedcoreError) -> None:
        if self._deadline is None:
            self.error = error
            self._end_api_servers()

    def _end_api_servers(self) -> None:
        """Ask them to drain; asked again, they abort."""
        limits = [plan.server.shutdown_timeout for plan in self._plans]
        wait_s = _LAST_WORDS_S + (max(limits, default=0.0) if self._deadline is None else 0.0)
        self._deadline = time.monotonic() + wait_s
        for process in _running_api_servers():
            process.terminate()

    def _leave(self) -> None:
        """Let LitServe's `run` return; where it waits for workers, only an interrupt helps."""
        self._over.set()
        # What has ended in order is no news, and LitServe's monitor may ask a Manager that is gone:
        logging.getLogger("litserve").setLevel(logging.CRITICAL)
        event = self._lit_server._shutdown_event
        self._lit_server._shutdown_event = threading.Event()  # which the monitor looks at next
        self._lit_server._shutdown_event.set()
        if event is not None:
            event.set()
        if not self._api_servers:
            self._interrupts = True
            os.kill(self._pid, signal.SIGINT)


def _running_api_servers() -> set[BaseProcess]:
    return {p for p in multiprocessing.active_children() if p.name.startswith("LitServer-")}


def _end_children() -> None:
    children = multiprocessing.active_children()
    steps: list[Callable[[BaseProcess], None]] = [lambda p: p.terminate(), lambda p: p.kill()]
    for step in steps:
        for process in children:
            if process.is_alive():
                step(process)
        for process in children:
            process.join(5)
