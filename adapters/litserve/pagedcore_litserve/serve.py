"""`pagedcore serve --server litserve`, and `run`: a LitServer that ends in order."""

import logging
from collections.abc import Callable
from typing import Any

from litserve import LitServer

from pagedcore.config import EngineConfig
from pagedcore.engine.start import BUILD
from pagedcore.errors import ConfigError
from pagedcore.server_config import ServerConfig
from pagedcore_litserve.api import PagedLitAPI, PagedSpec
from pagedcore_litserve.manager import Following
from pagedcore_litserve.supervisor import Supervisor
from pagedcore_openai.tls import tls_options

logger = logging.getLogger("pagedcore.server")

HOSTS = ("127.0.0.1", "0.0.0.0", "::")
"""Where LitServe can listen."""

PORTS = range(1024, 65536)

LAST_WORDS_S = 5
"""Seconds for answers that were aborted to reach their readers."""

MONITOR_S = 0.5
"""Seconds between LitServe's looks at its workers."""


def serve(config: EngineConfig, server: ServerConfig, *, build: str = BUILD) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status. In the main thread.

    `build` makes the engine, see `PagedLitAPI`. Raises ConfigError for an address that LitServe
    cannot listen on, what the engine's start fails with, and EngineDeadError for an engine that
    dies again and again.
    """
    _check_address(server.host, server.port)
    tls = tls_options(server)
    lit_server = LitServer(
        PagedLitAPI(engine=config, server=server, owns_server=True, build=build),
        accelerator="cpu",  # one worker, and the engine chooses its device
        timeout=False,
        restart_workers=True,
        disable_openapi_url=True,
    )
    lit_server.monitor_internal = MONITOR_S
    run(
        lit_server,
        host=server.host,
        port=server.port,
        num_api_servers=server.num_api_servers,
        log_level="info" if server.enable_log_requests else "warning",
        access_log=server.enable_log_requests,
        log_config=None,
        **tls,
    )
    return 0


def run(lit_server: LitServer, *, host: str, port: int, **options: Any) -> None:
    """Run a LitServer until SIGINT or SIGTERM, and end it in order; in the main thread.

    What `LitServer.run` lacks for models that stream: at a signal, requests that run may end
    within `shutdown_timeout` while new ones are refused, nothing is left behind, and a worker that
    dies again and again ends the server. `options` are those of `LitServer.run` and uvicorn.

    Raises ConfigError for an address that LitServe cannot listen on, what an engine's start fails
    with, and EngineDeadError.
    """
    _check_address(host, port)
    specs = [api.spec for api in lit_server.litapi_connector if isinstance(api.spec, PagedSpec)]
    for spec in specs:
        spec.is_supervised = True
    lit_server.uvicorn_graceful_timeout = LAST_WORDS_S
    if specs:
        server = specs[0].plan.server
        options = {
            "http": _Http(server),
            "loop": "pagedcore_openai.event_loop:ServingLoop",  # not imported in this process
            "proxy_headers": server.enable_log_requests,  # nothing else looks at addresses
            **options,
        }
    options = {"generate_client_file": False, "ws": "none", **options}
    plans = [spec.plan for spec in specs]
    Following(lit_server, plans)
    num_api_servers = options.get("num_api_servers")
    with Supervisor(lit_server, plans, num_api_servers) as supervisor:
        try:
            lit_server.run(host=host, port=port, **options)
        except KeyboardInterrupt:
            pass  # the supervisor ended it before its API servers were there
        except SystemExit:
            raise ConfigError(
                f"cannot listen on {host} port {port}: choose another --host or --port, or stop "
                "what listens there."
            ) from None
    if supervisor.error is not None:
        raise supervisor.error


class _Http:
    """The surface's HTTP protocol, imported by an API server while the model loads elsewhere."""

    def __init__(self, server: ServerConfig) -> None:
        self._server = server
        self._protocol: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Called by uvicorn for each connection."""
        if self._protocol is None:
            from pagedcore_openai.http_protocol import guarded_http

            self._protocol = guarded_http(self._server)
        return self._protocol(*args, **options)


def _check_address(host: str, port: int) -> None:
    if host not in HOSTS:
        raise ConfigError(
            f"LitServe can listen on {', '.join(HOSTS)}, not on {host!r}: choose one of them, or "
            "--server asgi, which takes any address"
        )
    if port not in PORTS:
        raise ConfigError(
            f"LitServe can listen on ports {PORTS.start} to {PORTS.stop - 1}, not on {port}: "
            "choose another --port, or --server asgi, which takes any"
        )
