"""The event loop of a server: uvloop, which takes in all who knock, however busy it is.

uvloop itself accepts one connection in each of its turns. With a thousand streams a turn takes as
long as a step, and who comes then would wait until the others have ended.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any

import uvloop

logger = logging.getLogger("pagedcore.server")

NAME = "pagedcore_openai.event_loop:ServingLoop"
"""For uvicorn's setting `loop`."""

FEW = 8
"""Connections that are taken in one turn: the first of many is answered before the last is read."""

PER_SECOND = 4000
"""Connections that are taken for the time that the last turn took, where more are waiting."""

PAUSE_S = 0.5
"""Seconds without taking connections where the process may not have any more."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class ServingLoop(uvloop.Loop):
    """Listens with a `Listener`, where the socket is given and is no unix socket."""

    async def create_server(  # type: ignore[override]  # asyncio's has names for what is passed on
        self, protocol_factory: Callable[[], asyncio.Protocol], *args: Any, **options: Any
    ) -> "asyncio.AbstractServer | Listener":
        """As asyncio's."""
        sock = options.get("sock")
        if sock is None or sock.family == socket.AF_UNIX:
            return await super().create_server(protocol_factory, *args, **options)
        return Listener(self, protocol_factory, sock, options.get("ssl"), options["backlog"])


class Listener:
    """What uvicorn needs of a server: it accepts until it is closed."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol_factory: Callable[[], asyncio.Protocol],
        sock: socket.socket,
        ssl: Any,
        backlog: int,
    ) -> None:
        self.sockets = (sock,)
        self._loop = loop
        self._protocol_factory = protocol_factory
        self._sock = sock
        self._ssl = ssl
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_turn: float | None = None
        """When more were waiting than were taken."""
        self._pause: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        sock.listen(backlog)
        loop.add_reader(sock, self._accept)

    def close(self) -> None:
        """Accept no more. Calling it again does nothing."""
        if self._pause is not None:
            self._pause.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    async def wait_closed(self) -> None:
        """There is nothing to wait for."""

    def _accept(self) -> None:
        now = self._loop.time()
        turn_s = 0.0 if self._last_turn is None else now - self._last_turn
        self._last_turn = now
        for _ in range(max(FEW, int(turn_s * PER_SECOND))):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                self._last_turn = None
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                logger.error("no connection can be taken now: %s", error.strerror)
                self._loop.remove_reader(self._sock)
                self._pause = self._loop.call_later(PAUSE_S, self._go_on)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._take(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._accept)

    async def _take(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._protocol_factory, connection, ssl=self._ssl
            )
        except (OSError, asyncio.CancelledError):  # a handshake that failed, or a client that left
            connection.close()
