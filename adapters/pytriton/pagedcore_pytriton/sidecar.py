"""The OpenAI surface beside Triton: a server in a thread, with an event loop of its own."""

import asyncio
import logging
import socket
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import uvicorn

from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.server_config import ServerConfig
from pagedcore_openai import event_loop
from pagedcore_openai.app import build_app
from pagedcore_openai.counters import Counters
from pagedcore_openai.http_protocol import guarded_http
from pagedcore_openai.surface import Surface
from pagedcore_openai.tls import tls_options

logger = logging.getLogger("pagedcore.server")

_LAST_WORDS_S = 5
"""Seconds for answers that were aborted to reach their readers."""


class Sidecar:
    """Serves from `__enter__` to `__exit__`, at a socket that listens."""

    def __init__(
        self,
        address: str,
        config: EngineConfig,
        server: ServerConfig,
        listener: socket.socket,
        counters: Counters,
    ) -> None:
        """`address` is the engine's socket."""
        app = build_app(EngineClient(address), config, server, counters=counters)
        self._surface: Surface = app.state.surface
        self._listener = listener
        self._server = _Server(
            uvicorn.Config(
                app,
                http=guarded_http(server),
                loop=event_loop.NAME,
                log_config=None,
                access_log=server.enable_log_requests,
                ws="none",
                proxy_headers=server.enable_log_requests,  # nothing else looks at addresses
                timeout_graceful_shutdown=_LAST_WORDS_S,
                **tls_options(server),
            )
        )
        self._thread = threading.Thread(target=self._run, name="pagedcore-openai", daemon=True)

    def wait_loaded(self) -> None:
        """Wait until the model's text side is there; raises ModelError if it cannot be."""
        self._call(self._surface.loaded()).result()

    def drain(self, timeout_s: float) -> "Future[None]":
        """Take no more work, let what runs end for so long, then abort the rest (LIFE-4)."""
        return self._call(self._surface.drain(timeout_s))

    def abort_all(self) -> None:
        """End all work now."""
        self._server.loop.call_soon_threadsafe(self._surface.abort_all)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server.begun.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])

    def _call(self, work: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._server.loop)


class _Server(uvicorn.Server):
    """uvicorn, which tells when it serves and where; signals are for the main thread."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.begun = threading.Event()
        self.loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.begun.set()
