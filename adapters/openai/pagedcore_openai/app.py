"""build_app: the OpenAI surface as an ASGI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pluggy
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.errors import PagedcoreError
from pagedcore.plugins import load_plugins
from pagedcore.server_config import ServerConfig
from pagedcore_openai.counters import Counters
from pagedcore_openai.direct import DirectApp
from pagedcore_openai.endpoints import Endpoints
from pagedcore_openai.errors import ApiError, as_api_error
from pagedcore_openai.gate import Gate
from pagedcore_openai.intake import Intake
from pagedcore_openai.lora import LoraRoutes
from pagedcore_openai.openapi import describe, document
from pagedcore_openai.plugin_routes import add_plugin_routes
from pagedcore_openai.probes import Probes
from pagedcore_openai.response_store import ResponseStore
from pagedcore_openai.responses import Responses
from pagedcore_openai.surface import Surface
from pagedcore_openai.unbuilt import add_unbuilt

EXPOSED_HEADERS = (
    "retry-after",
    "x-request-id",
    "x-pagedcore-adjusted-params",
    "x-pagedcore-ignored-params",
)
"""Of ours, what scripts in a browser may read."""

_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
}
"""The page needs nothing but its own text and this server."""

_CHAT_PAGE = Path(__file__).with_name("chat.html")


def build_app(
    client: EngineClient,
    config: EngineConfig,
    server: ServerConfig | None = None,
    *,
    counters: Counters | None = None,
    slot: int = 0,
    responses: ResponseStore | None = None,
    plugins: pluggy.PluginManager | None = None,
) -> FastAPI:
    """The surface of the engine that `client` reaches, for one event loop.

    Where several processes serve one engine, `counters` is made before they are forked, and each
    has its own `slot` in it: /metrics then tells of all of them. Where one process serves several
    engines as one, their surfaces share `responses`. `plugins` are those that may add routes: by
    default all that `config` lets in. Raises PluginError for one whose routes cannot be added.

    It answers from the start and serves once the engine is ready. Its lifespan starts and ends
    it; where that is not run, the first request starts it. `app.state.surface` is its `Surface`.
    """
    server = server or ServerConfig()
    counters = counters or Counters()
    tracing = None
    if server.otlp_traces_endpoint is not None:
        from pagedcore_openai.tracing import Traced, Tracing  # what it needs is an extra

        tracing = Tracing(server.otlp_traces_endpoint)
    surface = Surface(client, config, server, counters, counters.slot(slot), tracing)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        surface.start()
        yield
        await surface.close()

    app = DirectApp(
        title="pagedcore",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
    )
    app.state.surface = surface
    if tracing is not None:
        app.guard(Traced, tracing=tracing)
    app.guard(Gate, server=server)
    if server.allowed_origins:  # in front of the gate: a browser asks without a key first
        app.guard(
            CORSMiddleware,
            allow_origins=server.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    for kind in (ApiError, PagedcoreError, ValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    intake = Intake(surface)
    endpoints = Endpoints(surface, intake)
    endpoints.add_to(app)
    app.add_direct("/v1/completions", endpoints.completions)
    app.add_direct("/v1/chat/completions", endpoints.chat)
    Responses(surface, intake, responses or ResponseStore()).add_to(app)
    Probes(surface).add_to(app)
    add_unbuilt(app, surface)
    if server.enable_admin_api:
        LoraRoutes(surface, intake).add_to(app)
    app.add_api_route("/", _chat_page, methods=["GET"], **describe(media_type="text/html"))
    app.add_api_route("/openapi.json", _openapi, methods=["GET"], **describe())
    execution = config.execution
    plugins = plugins or load_plugins(execution.disable_plugin, execution.only_plugin)
    add_plugin_routes(app, client, plugins)
    return app


async def _chat_page(request: Request) -> Response:
    """A page to talk to the model."""
    return HTMLResponse(_CHAT_PAGE.read_bytes(), headers=_PAGE_HEADERS)


async def _openapi(request: Request) -> Response:
    """This document."""
    return JSONResponse(document(request.app))


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    messages = {404: f"there is no {what}", 405: f"{what} is not allowed"}
    message = messages.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()
