"""The mount "asgi": uvicorn, the surface, and an engine in a child process."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.engine.process import EngineProcess
from pagedcore.errors import ConfigError
from pagedcore.server_config import ServerConfig
from pagedcore_openai.app import build_app
from pagedcore_openai.http_protocol import guarded_http
from pagedcore_openai.surface import Surface

logger = logging.getLogger("pagedcore.server")

_LAST_WORDS_S = 5
"""Seconds for answers that were aborted to reach their readers."""


def serve(config: EngineConfig, server: ServerConfig) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    The address is taken first and the engine started then. Raises ConfigError when the address
    is taken, and whatever the engine's start fails with.
    """
    if server.num_api_servers != 1:
        raise ConfigError(
            f"the server 'asgi' is one process: num_api_servers must be 1, not "
            f"{server.num_api_servers}; --server litserve can have several"
        )
    with listen(server.host, server.port) as listener, EngineProcess(config) as process:
        return serve_engine(process, config, server, listener)


def serve_engine(
    process: EngineProcess, config: EngineConfig, server: ServerConfig, listener: socket.socket
) -> int:
    """Serve an engine that loads or runs, at a socket that listens; as `serve` does."""
    app = build_app(EngineClient(process.address), config, server)
    settings = uvicorn.Config(
        app,
        http=guarded_http(server),
        loop="uvloop",
        log_config=None,
        access_log=server.enable_log_requests,
        ws="none",
        timeout_graceful_shutdown=_LAST_WORDS_S,
    )
    http = Server(settings, app.state.surface, process)
    http.run(sockets=[listener])
    if http.error is not None:
        raise http.error
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises ConfigError in one line where that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}. "
            "Choose another --host or --port, or stop what listens there."
        ) from None


class Server(uvicorn.Server):
    """uvicorn, which drains before it closes its port, and ends when the engine cannot start."""

    def __init__(self, config: uvicorn.Config, surface: Surface, process: EngineProcess) -> None:
        super().__init__(config)
        self.error: Exception | None = None
        """Why it ended by itself."""
        self._surface = surface
        self._process = process

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and to wait for the engine."""
        await super().startup(sockets)
        self._waiting = asyncio.create_task(self._wait_ready(sockets or []))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain with the port open, so that new requests get an answer (LIFE-4)."""
        self._waiting.cancel()
        await self._surface.drain(self._surface.server.shutdown_timeout)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End in order at the first signal, at once at the second, and never by a signal."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        loop = asyncio.get_running_loop()
        for number in numbers:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if self.should_exit:
            self._surface.abort_all()
        self.should_exit = True

    async def _wait_ready(self, sockets: list[socket.socket]) -> None:
        host, port = sockets[0].getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        logger.info("%s answers; the model is loading", url)
        try:
            await asyncio.to_thread(self._process.wait_ready)
            await self._surface.loaded()
        except Exception as error:
            self.error = error
            self.should_exit = True
        else:
            info = self._surface.info
            seconds = info.startup_seconds.get("total", 0.0)
            logger.info("%s serves %s (loaded in %.1f s)", url, info.served_model_names[0], seconds)
