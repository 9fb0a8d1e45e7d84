"""A front end's connection to an engine: kept up, and known to be down within seconds.

A process that ends closes its sockets, so a killed engine is noticed at once, whatever its
parentage or pid namespace. One that is stopped or stuck is noticed by pings without an answer; its
connection is closed, which makes it drop our work if it ever goes on.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import msgspec

from pagedcore.engine import wire

logger = logging.getLogger(__name__)

BEAT_S = 0.5
"""Seconds between two pings."""

MAX_SILENT_BEATS = 8
"""Beats without any answer after which an engine counts as dead. Beats are counted, not seconds:
a front end that was held up itself must not blame the engine."""

RETRY_S = 0.2
"""Seconds between two attempts to reach an engine."""

PING = 0
"""The id of pings: their replies are looked at by nobody, they only have to come."""


class Link:
    """Connects to a server, and connects again when that was lost, until it is closed.

    `on_message` is called with each message but the welcome, `on_lost` with the reason when the
    connection is over, both in the event loop that made the link.
    """

    def __init__(
        self,
        address: str,
        on_message: Callable[[wire.FromServer], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.welcome: wire.Welcome | None = None
        self.connected = asyncio.Event()
        self.tried = asyncio.Event()
        self._address = address
        self._on_message = on_message
        self._on_lost = on_lost
        self._connection: _Connection | None = None
        self._keeper = asyncio.create_task(self._keep())

    def send(self, frame: bytes) -> None:
        """Send without waiting, if there is a connection."""
        if self._connection is not None:
            self._connection.send(frame)

    async def close(self) -> None:
        """Disconnect for good."""
        self._keeper.cancel()
        await asyncio.wait([self._keeper])

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, connection = await loop.create_unix_connection(
                    lambda: _Connection(self._receive), self._address
                )
            except OSError:
                pass  # nobody listens: the engine is loading, or gone
            else:
                await self._use(connection)
            self.tried.set()
            await asyncio.sleep(RETRY_S)

    async def _use(self, connection: "_Connection") -> None:
        self._connection = connection
        reason = "the client was closed"
        try:
            reason = await self._beat(connection)
        finally:
            connection.end(reason)
            self._connection = None
            if self.connected.is_set():
                self.connected.clear()
                self._on_lost(reason)

    async def _beat(self, connection: "_Connection") -> str:
        """Ping until the connection is over; return why it is."""
        ping = wire.encode(wire.Call(PING, "ping", {}))
        silent = 0
        while silent < MAX_SILENT_BEATS:
            num_received = connection.num_received
            connection.send(ping)
            done, _ = await asyncio.wait([connection.ended], timeout=BEAT_S)
            if done:
                return connection.ended.result()
            silent = silent + 1 if connection.num_received == num_received else 0
        return "the engine does not answer"

    def _receive(self, message: wire.FromServer) -> None:
        if not isinstance(message, wire.Welcome):
            self._on_message(message)
            return
        self.welcome = message
        self.connected.set()
        self.tried.set()


class _Connection(asyncio.Protocol):
    def __init__(self, on_message: Callable[[wire.FromServer], None]) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.num_received = 0
        self._on_message = on_message
        self._frames = wire.FrameReader()
        self._unsent: list[bytes] = []
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has no common class

    def data_received(self, data: bytes) -> None:
        if self.ended.done():
            return
        self.num_received += 1
        try:
            for frame in self._frames.feed(data):
                self._take(wire.decode_from_server(frame))
        except (ValueError, msgspec.MsgspecError):
            logger.exception("the engine sent something that is no message of this protocol")
            self.end("the engine could not be understood")

    def _take(self, message: wire.FromServer) -> None:
        match message:
            case wire.Welcome(version=version) if version != wire.VERSION:
                self.end(f"the engine speaks version {version} of the protocol, not {wire.VERSION}")
            case wire.Dead(message=reason):
                self.end(reason)
            case wire.Malformed(message=text):
                logger.error("the engine did not understand a message: %s", text)
            case _:
                self._on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        self.end("the engine process has ended")

    def send(self, frame: bytes) -> None:
        """Send with whatever else this turn of the event loop has to send."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(frame)

    def _flush(self) -> None:
        assert self._transport is not None
        self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def end(self, reason: str) -> None:
        """Close; of several reasons the first counts."""
        if not self.ended.done():
            self.ended.set_result(reason)
        if self._transport is not None:
            self._transport.abort()
