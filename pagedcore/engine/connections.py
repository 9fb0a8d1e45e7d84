"""The server's side of the socket: accepts front ends, in a thread of its own.

What front ends send is put into a queue for the engine's thread; what the engine has for them is
handed over once per step. Pings are answered here, so they are answered while a step runs.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec

from pagedcore.engine import wire
from pagedcore.errors import ConfigError
from pagedcore.step import StepOutput

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 16 << 20
"""A front end that has so much left to read when more arrives is dropped, with all its work."""

CLOSE_S = 1.0
"""Seconds that front ends have to read the last words."""

_MAX_PATH_BYTES = 107  # sockaddr_un, without the ending zero

Event = tuple[int, wire.Add | wire.Abort | wire.Call | None]
"""A connection, and what came from it; None when it has ended."""


class Connections:
    """Front ends at one unix socket. Every method may be called from any thread."""

    def __init__(
        self,
        address: str,
        welcome: wire.Welcome,
        events: "SimpleQueue[Event | None]",
        ping: Callable[[], dict[str, Any]],
    ) -> None:
        """Listen, and start the thread.

        `ping` is called there; what it returns is the answer to pings. Raises ConfigError for an
        address that cannot be listened on.
        """
        listener = listen(address)
        self._address = address
        self._inode = os.stat(address).st_ino
        self._welcome = wire.encode(welcome)
        self._events = events
        self._ping = ping
        self._connections: dict[int, _Connection] = {}
        self._last_number: int = 0
        self._all_gone = asyncio.Event()
        self._closing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="pagedcore-sockets", daemon=True)
        self._thread.start()
        accepting = self._loop.create_unix_server(lambda: _Connection(self), sock=listener)
        self._server = asyncio.run_coroutine_threadsafe(accepting, self._loop).result()

    def deliver(self, output: StepOutput) -> None:
        """Hand a step's results to their front ends; the arrays must not change afterwards."""
        self._submit(self._deliver, output)

    def send(self, connection: int, message: wire.FromServer) -> None:
        """Send to one front end, if it is still there."""
        self._submit(self._send, connection, message)

    def close(self, reason: str) -> None:
        """Tell all front ends that the engine ends, disconnect them, and end the thread.

        Calling it again does nothing.
        """
        with self._closing:
            if self._thread.is_alive():
                asyncio.run_coroutine_threadsafe(self._close(reason), self._loop)
                self._thread.join()

    def _submit(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # closed: nobody is there any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _close(self, reason: str) -> None:
        self._server.close()
        self._unlink()
        last_words = wire.encode(wire.Dead(reason))
        for connection in list(self._connections.values()):
            connection.send(last_words)
            connection.close()
        if self._connections:
            self._all_gone.clear()
            try:
                await asyncio.wait_for(self._all_gone.wait(), CLOSE_S)
            except TimeoutError:
                for connection in list(self._connections.values()):
                    connection.drop()
        self._loop.call_soon(self._loop.stop)

    def _unlink(self) -> None:
        try:
            if os.stat(self._address).st_ino == self._inode:  # not that of another server
                os.unlink(self._address)
        except FileNotFoundError:
            pass

    def _deliver(self, output: StepOutput) -> None:
        for number, part in wire.split_by_connection(output).items():
            self._send(number, part)

    def _send(self, number: int, message: wire.FromServer) -> None:
        connection = self._connections.get(number)
        if connection is not None:
            connection.send(wire.encode(message))

    # What a connection calls:

    def enter(self, connection: "_Connection") -> int:
        """Number a new connection and welcome it."""
        while True:
            self._last_number = self._last_number % wire.MAX_CONNECTION + 1
            if self._last_number not in self._connections:
                break
        self._connections[self._last_number] = connection
        connection.send(self._welcome)
        return self._last_number

    def leave(self, number: int) -> None:
        """Forget a connection; its work is going to be aborted."""
        del self._connections[number]
        self._events.put((number, None))
        if not self._connections:
            self._all_gone.set()

    def receive(self, number: int, message: wire.FromClient) -> None:
        """Answer a ping, and leave everything else to the engine's thread."""
        if isinstance(message, wire.Call) and message.name == "ping":
            self._send(number, wire.Reply(message.id, self._ping()))
        else:
            self._events.put((number, message))


class _Connection(asyncio.Protocol):
    """One front end."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._frames = wire.FrameReader(wire.MAX_REQUEST_BYTES)
        self._number = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._number = self._connections.enter(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.leave(self._number)

    def data_received(self, data: bytes) -> None:
        try:
            frames = self._frames.feed(data)
        except ValueError as error:  # the stream cannot be followed any more
            self.send(wire.encode(wire.Malformed(str(error))))
            self.close()
            return
        for frame in frames:
            try:
                message = wire.decode_from_client(frame)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                self.send(wire.encode(wire.Malformed(str(error)[: wire.MAX_MESSAGE_CHARS])))
            else:
                self._connections.receive(self._number, message)

    def send(self, frame: bytes) -> None:
        """Send without waiting; a front end that does not read is dropped."""
        if self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            logger.warning("a front end does not read: it is dropped, with what it had asked for")
            self.drop()
        else:
            self._transport.write(frame)

    def close(self) -> None:
        """Close when everything is sent; nothing more is received."""
        self._transport.close()

    def drop(self) -> None:
        """Close at once."""
        self._transport.abort()


def listen(address: str) -> socket.socket:
    """A listening unix socket, in a folder that only its owner may enter.

    The folder is made if there is none; the socket that a dead server left is replaced. Raises
    ConfigError, with a remedy, for a path that is too long, a folder that others may enter, an
    address in use, and whatever the system refuses.
    """
    if len(os.fsencode(address)) > _MAX_PATH_BYTES:
        raise ConfigError(
            f"the socket's path is longer than {_MAX_PATH_BYTES} bytes: {address}. "
            "Choose a shorter one (TMPDIR is where temporary folders are made)."
        )
    folder = Path(address).parent
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & 0o077:
            raise ConfigError(
                f"others may enter the socket's folder {folder} (mode {mode:o}): "
                f"choose a folder of its own, or `chmod 700` it"
            )
        if os.path.lexists(address):
            _remove_stale(address)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {address}: {error.strerror}") from None
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(address: str) -> None:
    """Remove a socket that nobody listens at; raises ConfigError if somebody does."""
    if not stat.S_ISSOCK(os.lstat(address).st_mode):
        raise ConfigError(f"there is something else at {address}: choose another address")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(address) != errno.ECONNREFUSED:
            raise ConfigError(
                f"another engine listens at {address}: stop it, or choose another address"
            )
    os.unlink(address)
