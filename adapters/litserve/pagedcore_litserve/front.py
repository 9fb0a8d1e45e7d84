"""The OpenAI surface in front of LitServe's own routes, for one event loop of an API server."""

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

from litserve.callbacks.base import EventTypes
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedcore.engine.client import EngineClient
from pagedcore.errors import PagedcoreError
from pagedcore_litserve.departure import Departure

if TYPE_CHECKING:
    from pagedcore_litserve.api import PagedSpec
    from pagedcore_openai.surface import Surface

logger = logging.getLogger("pagedcore.server")

LITSERVE_PATHS = frozenset({"/", "/health", "/info", "/openapi.json"})
"""Of ours, what LitServe answers, unless the surface owns the server."""


class Front:
    """ASGI middleware. It passes on what is not its own, and begins and ends with the app."""

    def __init__(self, app: ASGIApp, spec: "PagedSpec") -> None:
        """Called in the API server, when its app is first used."""
        from pagedcore_openai.app import build_app  # while the model loads elsewhere
        from pagedcore_openai.response_store import ResponseStore

        self._app = app
        self._spec = spec
        self._prefix = spec.api_path.rstrip("/")
        plan = spec.plan
        responses = ResponseStore()
        self._surface_apps = [
            build_app(
                EngineClient(plan.address(worker_id)),
                plan.engine,
                plan.server,
                counters=counters,
                slot=_own_number(),
                responses=responses,
            )
            for worker_id, counters in enumerate(spec.counters)
        ]
        self.surfaces: list[Surface] = [app.state.surface for app in self._surface_apps]
        """One for each engine."""
        self._surface_apps[0].router.routes.insert(0, Route("/metrics", self._metrics))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http" and self._is_ours(scope):
            await self._answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_ours(self, scope: Scope) -> bool:
        if self._spec.owns_server:
            return True
        path = scope["path"]
        if path in LITSERVE_PATHS or not path.startswith(f"{self._prefix}/"):
            return False
        inner = self._inner(scope)
        routes = self._surface_apps[0].routes
        return any(route.matches(inner)[0] is not Match.NONE for route in routes)

    def _inner(self, scope: Scope) -> Scope:
        return {**scope, "path": scope["path"][len(self._prefix) :]} if self._prefix else scope

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """By the surface that is ready, and then has the least to do."""
        inner = self._inner(scope)
        number = 0
        if inner["path"] != "/metrics":  # which the first one answers for all
            number = min(
                range(len(self.surfaces)),
                key=lambda i: (not self.surfaces[i].ready, self.surfaces[i].num_running),
            )
        server = self._spec._server
        callbacks = server._callback_runner
        callbacks.trigger_event(
            EventTypes.ON_REQUEST.value, active_requests=server.active_requests, litserver=server
        )
        try:
            await self._surface_apps[number](inner, receive, send)
        finally:
            callbacks.trigger_event(EventTypes.ON_RESPONSE.value, litserver=server)

    async def _metrics(self, request: Request) -> Response:
        """What all engines and their front ends have counted."""
        from pagedcore_openai.metrics import CONTENT_TYPE, exposition

        engines = []
        for surface in self.surfaces:
            stats = await surface.client.call("stats")
            engines.append((surface.info, stats, surface.counters))
        page = exposition(engines, alias=self._spec.plan.server.metrics_alias)
        return Response(page, headers={"content-type": CONTENT_TYPE})

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The surfaces begin after LitServe's app, and end after it."""
        departure = Departure.of(scope["app"], self._spec)
        tasks: list[asyncio.Task[None]] = []

        async def send_and_follow(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                tasks.extend(self._begin(departure))
            elif message["type"].startswith("lifespan.shutdown."):
                await self._end(departure, tasks)
            await send(message)

        await self._app(scope, receive, send_and_follow)

    def _begin(self, departure: Departure) -> list[asyncio.Task[None]]:
        self._spec.fronts[asyncio.get_running_loop()] = self
        departure.join(self.surfaces)
        works = [self._load(departure)]
        if _own_number() == 0 and self._spec._server.logger_queue is not None:
            works.append(self._log_stats())
        return [asyncio.create_task(work) for work in works]

    async def _end(self, departure: Departure, tasks: list[asyncio.Task[None]]) -> None:
        del self._spec.fronts[asyncio.get_running_loop()]
        for task in tasks:
            task.cancel()
        for surface in self.surfaces:
            await surface.close()
        departure.leave()

    async def _load(self, departure: Departure) -> None:
        """Wait until the engines are ready, and say so once."""
        says = _own_number() == 0 and self._spec.owns_server
        if says:
            logger.info("%s answers; the model is loading", self._url())
        try:
            await asyncio.gather(*(surface.loaded() for surface in self.surfaces))
        except Exception as error:
            departure.fail(error)
            return
        if self._spec.is_supervised:
            from pagedcore_openai.collector import settle_collector

            settle_collector()
        if says:
            info: Any = self.surfaces[0].info
            seconds = info.startup_seconds.get("total", 0.0)
            name = info.served_model_names[0]
            logger.info("%s serves %s (loaded in %.1f s)", self._url(), name, seconds)

    def _url(self) -> str:
        server = self._spec.plan.server
        scheme = "https" if server.ssl_certfile else "http"
        host = f"[{server.host}]" if ":" in server.host else server.host
        return f"{scheme}://{host}:{server.port}"

    async def _log_stats(self) -> None:
        """Hand the engines' counters to LitServe's loggers, for ever."""
        while True:
            await asyncio.sleep(self._spec.stats_interval_s)
            for number, surface in enumerate(self.surfaces):
                with contextlib.suppress(PagedcoreError, TimeoutError):
                    stats = await surface.client.call("stats")
                    await asyncio.to_thread(self._log, number, stats)

    def _log(self, engine: int, stats: dict[str, float]) -> None:
        for name, value in stats.items():
            self._spec.lit_api.log(f"{self._prefix}/engine/{engine}/{name}", value)


def _own_number() -> int:
    """Which of LitServe's API servers this is."""
    return int(os.environ.get("LITSERVE_WORKER_ID", "0"))
