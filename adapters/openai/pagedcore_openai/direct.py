"""An application that answers what nearly every request asks for without FastAPI's layers.

FastAPI has the routes, and says in /openapi.json what they are; but its dependencies, exit stacks
and handlers take a third of the time that a streamed request costs before its first token.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pagedcore.errors import PagedcoreError
from pagedcore_openai.errors import ApiError, as_api_error

logger = logging.getLogger("pagedcore.server")

Endpoint = Callable[[Request], Awaitable[Response]]


class DirectApp(FastAPI):
    """Every request passes what `guard` has put in front, and some pass nothing else."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._entry: ASGIApp = self._answer
        self._endpoints: dict[str, Endpoint] = {}

    def guard(self, middleware: Callable[..., ASGIApp], **options: Any) -> None:
        """Put this in front of everything, and of what was put there before."""
        self._entry = middleware(self._entry, **options)

    def add_direct(self, path: str, endpoint: Endpoint) -> None:
        """Answer POSTs to a path by an endpoint that is a route, too."""
        self._endpoints[path] = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by the server for each request."""
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
        else:
            await self._entry(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            endpoint = self._endpoints.get(scope["path"])
        if endpoint is None:
            await super().__call__(scope, receive, send)
            return
        try:
            response = await endpoint(Request(scope, receive, send))
        except Exception as error:
            if not isinstance(error, (ApiError, PagedcoreError, ValidationError)):
                logger.exception("a request has failed")
            response = as_api_error(error).response()
        await response(scope, receive, send)
