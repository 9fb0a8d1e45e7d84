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
from pagedcore.engine.process import BUILD
from pagedcore.errors import ConfigError
from pagedcore.server_config import ServerConfig
from pagedcore_openai import event_loop
from pagedcore_openai.app import build_app
from pagedcore_openai.collector import settle_collector
from pagedcore_openai.http_protocol import guarded_http
from pagedcore_openai.supervisor import Supervisor
from pagedcore_openai.surface import Surface
from pagedcore_openai.tls import tls_options

logger = logging.getLogger("pagedcore.server")

_LAST_WORDS_S = 5
"""Seconds for answers that were aborted to reach their readers."""


def serve(config: EngineConfig, server: ServerConfig, *, build: str = BUILD) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    The address is taken first and the engine started then; `build` makes it, see `EngineProcess`.
    An engine that dies is started again. Raises ConfigError when the address is taken, whatever
    the engine's start fails with, and EngineDeadError for one that dies again and again.
    """
    if server.num_api_servers != 1:
        raise ConfigError(
            f"the server 'asgi' is one process: num_api_servers must be 1, not "
            f"{server.num_api_servers}; --server litserve can have several"
        )
    tls = tls_options(server)
    with listen(server.host, server.port) as listener:
        supervisor = Supervisor(config, build=build)
        with contextlib.closing(supervisor):
            app = build_app(EngineClient(supervisor.address), config, server)
            settings = uvicorn.Config(
                app,
                http=guarded_http(server),
                loop=event_loop.NAME,
                log_config=None,
                access_log=server.enable_log_requests,
                ws="none",
                proxy_headers=server.enable_log_requests,  # nothing else looks at addresses
                timeout_graceful_shutdown=_LAST_WORDS_S,
                **tls,
            )
            http = Server(settings, app.state.surface, supervisor)
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
    """uvicorn, which drains before it closes its port, and ends when the engine cannot run."""

    def __init__(self, config: uvicorn.Config, surface: Surface, supervisor: Supervisor) -> None:
        super().__init__(config)
        self.error: Exception | None = None
        """Why it ended by itself."""
        self._surface = surface
        self._supervisor = supervisor

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and to wait for the engine."""
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._watch_engine(sockets or []))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain with the port open, so that new requests get an answer (LIFE-4)."""
        self._watching.cancel()
        await self._surface.drain(self._surface.server.shutdown_timeout)
        await super().shutdown(sockets)
        await asyncio.to_thread(self._supervisor.close)  # last

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

    async def _watch_engine(self, sockets: list[socket.socket]) -> None:
        host, port = sockets[0].getsockname()[:2]
        scheme = "https" if self.config.is_ssl else "http"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        logger.info("%s answers; the model is loading", url)
        try:
            await self._supervisor.wait_ready()
            await self._surface.loaded()
            settle_collector()
            info = self._surface.info
            seconds = info.startup_seconds.get("total", 0.0)
            logger.info("%s serves %s (loaded in %.1f s)", url, info.served_model_names[0], seconds)
            await self._supervisor.keep_alive()
        except Exception as error:
            self.error = error
            self.should_exit = True
