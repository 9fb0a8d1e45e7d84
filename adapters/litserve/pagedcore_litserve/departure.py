"""How an API server ends: it drains with the port open, and follows the main process."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import msgspec

from pagedcore.engine.start import StartFailure
from pagedcore_litserve.manager import end_manager
from pagedcore_litserve.plan import join_log

if TYPE_CHECKING:
    from pagedcore_litserve.api import PagedSpec
    from pagedcore_openai.surface import Surface

logger = logging.getLogger(__name__)

_STATE = "pagedcore_departure"


class Departure:
    """One per API server, for all its surfaces.

    Under `run`, the first SIGTERM drains, and the second does not wait; only then uvicorn learns
    of it, which closes the port. Ctrl-C is left to the main process. Without `run`, signals stay
    uvicorn's. Where the main process is gone, the API server ends as after SIGTERM.
    """

    def __init__(self, spec: "PagedSpec") -> None:
        self._spec = spec
        self._plan = spec.plan
        self._is_supervised = spec.is_supervised
        self._surfaces: list[Surface] = []
        self._draining: asyncio.Task[None] | None = None
        self._end: Callable[[int, Any], Any] | None = None
        self._main: int | None = None

    @classmethod
    def of(cls, app: Any, spec: "PagedSpec") -> Self:
        """The one of this app, made when it is first asked for."""
        departure: Self | None = getattr(app.state, _STATE, None)
        if departure is None:
            departure = cls(spec)
            setattr(app.state, _STATE, departure)
        return departure

    def join(self, surfaces: "list[Surface]") -> None:
        """Drain these too; in the event loop."""
        if not self._surfaces and os.getpid() != self._plan.main_pid:
            if self._plan.server.log_format == "json":
                join_log()
            self._listen()
        self._surfaces += surfaces

    def leave(self) -> None:
        """Called last: watch nothing any more."""
        if self._main is not None:
            asyncio.get_running_loop().remove_reader(self._main)
            os.close(self._main)
            self._main = None
        if os.getppid() != self._plan.main_pid != os.getpid():
            end_manager(self._spec._server.transport_config.manager.address)

    def fail(self, error: Exception) -> None:
        """Tell the main process that nothing can be served."""
        failure = StartFailure.of(error)
        logger.error("%s", failure.message)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.sendto(msgspec.msgpack.encode(failure), self._plan.failures)

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ProcessLookupError):
            self._main = os.pidfd_open(self._plan.main_pid)
        if self._main is None or os.getppid() != self._plan.main_pid:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            loop.add_reader(self._main, self._main_gone)
        if self._is_supervised and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGTERM)
            assert callable(handler)  # uvicorn's
            self._end = handler
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            loop.add_signal_handler(signal.SIGTERM, self._sigterm)

    def _main_gone(self) -> None:
        assert self._main is not None
        asyncio.get_running_loop().remove_reader(self._main)
        os.kill(os.getpid(), signal.SIGTERM)

    def _sigterm(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            for surface in self._surfaces:
                surface.abort_all()

    async def _drain(self) -> None:
        limit_s = self._plan.server.shutdown_timeout
        await asyncio.gather(*(surface.drain(limit_s) for surface in self._surfaces))
        assert self._end is not None
        self._end(signal.SIGTERM, None)
