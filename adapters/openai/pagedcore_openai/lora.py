"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters at run time (LORA-2)."""

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from pagedcore.errors import RequestError
from pagedcore_openai.intake import Intake
from pagedcore_openai.openapi import describe
from pagedcore_openai.protocol import Fields
from pagedcore_openai.surface import Surface

_LOAD_S = 120.0
"""Seconds that an engine may take to read an adapter."""


class LoadAdapterRequest(Fields):
    """POST /v1/load_lora_adapter: a folder on the server, as PEFT saves adapters."""

    lora_name: str
    lora_path: str


class UnloadAdapterRequest(Fields):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class LoraRoutes:
    """Routes that change the server; without --enable-admin-api they do not exist (HTTP-3)."""

    def __init__(self, surface: Surface, intake: Intake) -> None:
        self._surface = surface
        self._intake = intake

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        for path, endpoint, kind in (
            ("/v1/load_lora_adapter", self.load, LoadAdapterRequest),
            ("/v1/unload_lora_adapter", self.unload, UnloadAdapterRequest),
        ):
            about = describe(kind, works=True, media_type="text/plain")
            app.add_api_route(path, endpoint, methods=["POST"], **about)

    async def load(self, request: Request) -> Response:
        """Load an adapter from below --lora-root; requests then name it as their model."""
        body = await self._intake.body(request)
        fields, headers = self._intake.checked(LoadAdapterRequest, body)
        for name in ("lora_name", "lora_path"):
            if not getattr(fields, name):
                raise RequestError(f"{name} must not be empty", name)
        await self._surface.client.call(
            "load_adapter", timeout_s=_LOAD_S, name=fields.lora_name, folder=fields.lora_path
        )
        return PlainTextResponse(f"Success: {fields.lora_name!a} is loaded.", headers=headers)

    async def unload(self, request: Request) -> Response:
        """Forget an adapter; requests that run with it end as they would have."""
        body = await self._intake.body(request)
        fields, headers = self._intake.checked(UnloadAdapterRequest, body)
        await self._surface.client.call("unload_adapter", timeout_s=_LOAD_S, name=fields.lora_name)
        return PlainTextResponse(f"Success: {fields.lora_name!a} is unloaded.", headers=headers)
