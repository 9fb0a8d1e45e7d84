"""Learns from Triton's side that a client has gone, and cancels what works for it.

Triton tells its Python backend, not PyTriton's callables. `stub_model.py` asks there and sends the
request's uid as a datagram to a socket in the workspace.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CANCEL_SOCKET = "{}-cancel.sock"
"""By the model's name; the same as in `stub_model.py`, which cannot be imported here."""

UID = "_pagedcore_uid"
"""The same, too: the request parameter that holds the uid."""

_MAX_EARLY = 4096
_MAX_NOTICE_BYTES = 256


class Cancellations:
    """Tasks by uid, all of one event loop."""

    def __init__(self, workspace: Path, model_name: str) -> None:
        """Bind the socket."""
        self._path = workspace / CANCEL_SOCKET.format(model_name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self._path))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._closed = False
        self._early: deque[str] = deque(maxlen=_MAX_EARLY)

    @contextmanager
    def watch(self, uid: str) -> Iterator[None]:
        """While inside, the current task is cancelled when the request's client has gone."""
        if self._loop is None and not self._closed:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket, self._receive)
        task = asyncio.current_task()
        assert task is not None
        self._tasks[uid] = task
        if uid in self._early:  # the notice has overtaken the request
            task.cancel()
        try:
            yield
        finally:
            del self._tasks[uid]

    def cancel_all(self) -> None:
        """Cancel every task that is watched."""
        for task in self._tasks.values():
            task.cancel()

    def close(self) -> None:
        """Hear of nothing any more; in the event loop, unless that has ended or never began."""
        if self._closed:
            return
        self._closed = True
        if self._loop is not None and self._loop.is_running():
            self._loop.remove_reader(self._socket)
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _receive(self) -> None:
        while True:
            try:
                uid = self._socket.recv(_MAX_NOTICE_BYTES).decode(errors="replace")
            except BlockingIOError:
                return
            task = self._tasks.get(uid)
            if task is None:
                self._early.append(uid)
            else:
                task.cancel()
