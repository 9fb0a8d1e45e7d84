"""PagedLitAPI: a model, as a LitServer is given it; beside other LitAPIs if need be."""

import asyncio
import contextlib
from typing import Any

from litserve import LitAPI
from litserve.specs.base import LitSpec

from pagedcore.config import EngineConfig
from pagedcore.engine.start import BUILD
from pagedcore.errors import ConfigError, PagedcoreError
from pagedcore.server_config import ServerConfig
from pagedcore_litserve.front import Front
from pagedcore_litserve.plan import Plan
from pagedcore_litserve.worker import PagedLoop
from pagedcore_openai.counters import Counters

PING_S = 1.0
"""Seconds that an engine has to answer LitServe's health check."""


class PagedLitAPI(LitAPI):  # type: ignore[misc]  # LitServe ships no types
    """A model behind the OpenAI surface.

        server = LitServer(PagedLitAPI(engine=EngineConfig.from_options(model="...")))
        run(server, port=8000)

    Each worker that LitServe starts for it has an engine of its own, on the worker's device;
    requests go to the one with the least to do. The surface's routes are answered before
    LitServe's own; `/`, `/health`, `/info` and other LitAPIs' routes stay LitServe's.
    """

    def __init__(
        self,
        *,
        engine: EngineConfig | None = None,
        server: ServerConfig | None = None,
        api_path: str = "/",
        owns_server: bool = False,
        stats_interval_s: float = 10.0,
        build: str = BUILD,
    ) -> None:
        """Nothing is loaded before the server runs.

        :param server: limits and keys of the surface's routes. Host, port and `num_api_servers`
            are those that `LitServer.run` is given.
        :param api_path: what the surface's routes begin with, so that several models share a port.
        :param owns_server: answer every path, also those that are LitServe's.
        :param stats_interval_s: how often LitServe's loggers, if there are any, are given the
            engine's counters: as `/engine/0/num_requests_running` and the like.
        :param build: what makes the engine, as module:function; see `BUILD`.
        """
        if not api_path.startswith("/") or (api_path != "/" and api_path.endswith("/")):
            raise ConfigError(f"api_path must be '/', or begin and not end with it: {api_path!r}")
        spec = PagedSpec(engine or EngineConfig(), server or ServerConfig(), build)
        spec.api_path = api_path
        spec.owns_server = owns_server
        spec.stats_interval_s = stats_interval_s
        super().__init__(spec=spec, loop=PagedLoop())

    def setup(self, device: str) -> None:
        """Nothing: `PagedLoop` builds the engine, so that the port is open while it loads."""

    async def health(self) -> bool:
        """Whether every engine answers; asked by LitServe's own `/health`."""
        front = self.spec.fronts.get(asyncio.get_running_loop())
        if front is None:
            return False
        with contextlib.suppress(PagedcoreError, TimeoutError):
            for surface in front.surfaces:
                await surface.client.call("ping", timeout_s=PING_S)
            return True
        return False


class PagedSpec(LitSpec):  # type: ignore[misc]  # LitServe ships no types
    """What LitServe asks about the surface: in the main process, and in its API servers."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, build: str) -> None:
        super().__init__()
        self.owns_server = False
        self.is_supervised = False
        """Whether `run` starts the server: then API servers drain before they close the port."""
        self.stats_interval_s = 10.0
        self.counters: list[Counters] = []
        """For each engine, what its front ends count: memory that all API servers share."""
        self.fronts: dict[asyncio.AbstractEventLoop, Front] = {}
        """The surface of each event loop of this process."""
        self._settings: dict[str, Any] = {"engine": engine, "server": server, "build": build}
        self._plan: Plan | None = None
        self._mounted_in: Any = None

    @property
    def plan(self) -> Plan:
        """Made when it is first asked for: where a program only imports, no folder is made."""
        if self._plan is None:
            self._plan = Plan(**self._settings)
        return self._plan

    @property
    def stream(self) -> bool:
        """True: LitServe then compresses nothing."""
        return True

    @property
    def endpoints(self) -> list[Any]:
        """Asked by a LitServer that has made its app: the surface goes in front of it."""
        if self._mounted_in is not self._server.app:
            self._mounted_in = self._server.app
            self._server.app.add_middleware(Front, spec=self)
        return []

    def pre_setup(self, lit_api: PagedLitAPI) -> None:
        """Called by a LitServer that is being made."""
        self.lit_api = lit_api

    def setup(self, server: Any) -> None:
        """Called in the main process before workers start."""
        if not self.counters:  # and not a worker that is started again
            num_workers = len(server._inference_workers_config_for_api(self.api_path))
            num_api_servers = self._server.transport_config.num_consumers
            self.counters = [Counters(num_api_servers) for _ in range(num_workers)]

    def __getstate__(self) -> dict[str, Any]:
        """What goes to a worker."""
        own: dict[str, Any] = {"fronts": {}, "counters": [], "_mounted_in": None}
        return {**super().__getstate__(), **own, "_plan": self.plan}

    def decode_request(self, request: Any, context_kwargs: Any = None) -> Any:
        """LitServe's own requests: there are none."""
        return request

    def encode_response(self, output: Any, context_kwargs: Any = None) -> Any:
        """As `decode_request`."""
        return output
