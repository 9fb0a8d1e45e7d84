"""Routes that clients of other servers know, and that are not built here (semantics HTTP-1)."""

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from pagedcore_openai.errors import ApiError
from pagedcore_openai.openapi import describe, not_built
from pagedcore_openai.surface import Surface

UNBUILT = (
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/pooling",
    "/classify",
    "/generate",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
"""Answered with 501: the address is right, the task is not ours."""

ADMIN_UNBUILT = ("/sleep", "/wake_up")


class Admin:
    """Routes that change the server; without --enable-admin-api they do not exist (HTTP-3)."""

    def __init__(self, surface: Surface) -> None:
        self._surface = surface

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        app.add_api_route(
            "/reset_prefix_cache",
            self.reset_prefix_cache,
            methods=["POST"],
            **describe(media_type=None),
        )
        app.add_api_route("/is_sleeping", self.is_sleeping, methods=["GET"], **describe())

    async def reset_prefix_cache(self, request: Request) -> Response:
        """POST /reset_prefix_cache: forget cached prefixes; 503 while anything runs (POOL-7)."""
        if not await self._surface.client.call("reset_prefix_cache"):
            message = "blocks are in use: wait until nothing runs"
            raise ApiError(503, message, headers={"retry-after": "1"})
        return Response()

    async def is_sleeping(self, request: Request) -> Response:
        """GET /is_sleeping: this engine never sleeps."""
        return Response(b'{"is_sleeping": false}', media_type="application/json")


def add_unbuilt(app: FastAPI, surface: Surface) -> None:
    """Add the routes that are known, and say what they are not."""
    paths: tuple[str, ...] = UNBUILT
    if surface.server.enable_admin_api:
        Admin(surface).add_to(app)
        paths += ADMIN_UNBUILT
    for path in paths:
        app.add_api_route(path, _not_built, methods=["POST"], **not_built())


async def _not_built(request: Request) -> Response:
    """Not implemented: always 501."""
    raise ApiError(501, f"POST {request.scope['path']} is not implemented")
