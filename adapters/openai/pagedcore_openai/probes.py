"""Whether the server lives, is ready, and what it is doing (semantics LIFE-1)."""

import asyncio

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pagedcore import __version__
from pagedcore.engine.generation import Generation
from pagedcore.errors import EngineDeadError, OverloadedError
from pagedcore.pooling import PoolingParams
from pagedcore.request import FinishReason, SamplingParams
from pagedcore_openai.counters import PROBE_COUNTERS
from pagedcore_openai.metrics import CONTENT_TYPE, exposition
from pagedcore_openai.openapi import describe
from pagedcore_openai.surface import Surface

GENERATE_TIMEOUT_S = 10.0
"""Seconds that one token may take in /health_generate (LIFE-2)."""


class Probes:
    """Routes for whoever watches the server."""

    def __init__(self, surface: Surface) -> None:
        self._surface = surface

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        for path, endpoint, media_type in (
            ("/health", self.health, None),
            ("/ping", self.health, None),
            ("/livez", self.livez, None),
            ("/readyz", self.readyz, None),
            ("/health_generate", self.health_generate, None),
            ("/version", self.version, "application/json"),
            ("/load", self.load, "application/json"),
            ("/metrics", self.metrics, "text/plain"),
        ):
            methods = ["GET", "POST"] if path == "/ping" else ["GET"]
            app.add_api_route(path, endpoint, methods=methods, **describe(media_type=media_type))

    async def livez(self, request: Request) -> Response:
        """Whether restarting would not help."""
        self._surface.start()
        if self._surface.client.dead:
            raise EngineDeadError("it does not answer")
        return Response()

    async def health(self, request: Request) -> Response:
        """Whether the engine works, be new requests taken or not."""
        await self.livez(request)
        _ = self._surface.inputs
        return Response()

    async def readyz(self, request: Request) -> Response:
        """Whether new requests are taken."""
        self._surface.start()
        self._surface.check_ready()
        return Response()

    async def health_generate(self, request: Request) -> Response:
        """Whether a token can be generated."""
        surface = self._surface
        surface.start()
        surface.check_open()
        try:
            async with asyncio.timeout(GENERATE_TIMEOUT_S), self._probe() as generation:
                async for chunk in generation:
                    if chunk.finish_reason is FinishReason.LENGTH or chunk.vector is not None:
                        for name in PROBE_COUNTERS:  # it is no request (LIFE-2)
                            surface.slot.add(name)
                        return Response()
        except TimeoutError:
            pass
        raise OverloadedError(f"no token within {GENERATE_TIMEOUT_S:g} s", "not_ready")

    def _probe(self) -> Generation:
        """A request for one token, or for a vector where the model does not generate."""
        surface = self._surface
        if surface.info.task != "generate":
            return surface.client.pool([0], PoolingParams())
        item = surface.inputs.completion([0], SamplingParams(max_tokens=1, ignore_eos=True))
        return surface.client.generate(item.prompt_token_ids, item.params)

    async def metrics(self, request: Request) -> Response:
        """What the engine and its front ends have counted, for Prometheus."""
        surface = self._surface
        stats = await surface.client.call("stats")
        engine = (surface.info, stats, surface.counters)
        page = exposition([engine], alias=surface.server.metrics_alias)
        return Response(page, headers={"content-type": CONTENT_TYPE})

    async def version(self, request: Request) -> Response:
        """Of this software."""
        return JSONResponse({"version": __version__})

    async def load(self, request: Request) -> Response:
        """Inference requests in flight."""
        return JSONResponse({"server_load": self._surface.num_running})
