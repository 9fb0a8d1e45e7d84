"""Notices that a client has gone away while its request is worked on."""

import asyncio
from collections.abc import Callable
from typing import Any, Self

from starlette.types import Receive, Scope

CONNECTION = "pagedcore.connection"
"""The scope extension that holds the request's `Connection`: see `http_protocol`."""


class Connection:
    """Tells whoever wants to know that a connection is lost."""

    __slots__ = ("_callbacks", "is_lost")

    def __init__(self) -> None:
        self.is_lost = False
        self._callbacks: set[Callable[[], object]] = set()

    def lose(self) -> None:
        """It is lost now."""
        self.is_lost = True
        for callback in tuple(self._callbacks):
            callback()

    def tell(self, callback: Callable[[], object]) -> None:
        """Call it when the connection is lost, or at once."""
        self._callbacks.add(callback)
        if self.is_lost:
            callback()

    def forget(self, callback: Callable[[], object]) -> None:
        """Do not call it any more."""
        self._callbacks.discard(callback)


class Watch:
    """Cancels a task when the client of its request goes away; a context manager.

    Servers that know nothing of `Connection` are asked by another task, which costs more.
    """

    __slots__ = ("_connection", "_receive", "_task", "_watcher", "is_gone")

    def __init__(self, scope: Scope, receive: Receive, task: "asyncio.Task[Any]") -> None:
        self.is_gone = False
        """Whether the task was cancelled for this."""
        extensions = scope.get("extensions") or {}
        self._connection: Connection | None = extensions.get(CONNECTION)
        self._receive = receive
        self._task = task
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        if self._connection is not None:
            self._connection.tell(self._cancel)
        else:
            self._watcher = asyncio.create_task(self._wait())
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.forget(self._cancel)
        if self._watcher is not None:
            self._watcher.cancel()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._cancel()

    def _cancel(self) -> None:
        self.is_gone = True
        self._task.cancel()
