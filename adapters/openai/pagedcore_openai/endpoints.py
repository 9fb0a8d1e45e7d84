"""What each inference route does: check, prepare, run, shape."""

import time
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pagedcore.errors import EngineDeadError, RequestError
from pagedcore.text.inputs import EngineInput
from pagedcore_openai import prepare
from pagedcore_openai.answer import Answer
from pagedcore_openai.body import check_sizes, header_list, ignored_paths, parse_object
from pagedcore_openai.chat import ChatShape
from pagedcore_openai.completions import CompletionShape
from pagedcore_openai.errors import ApiError, as_api_error
from pagedcore_openai.event_stream import EventStream, Shape
from pagedcore_openai.gate import ARRIVAL, DEADLINE, REQUEST_ID, valid_request_id
from pagedcore_openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from pagedcore_openai.surface import ClientGoneError, Surface
from pagedcore_openai.unbuilt import other_task

Fields = TypeVar("Fields", bound=BaseModel)

_LARGE_BODY_BYTES = 1 << 16
"""Bodies above this are parsed outside the event loop."""

_CLIENT_CLOSED_REQUEST = 499
ABORT = "pagedcore.abort"
"""The scope extension that closes a connection at once: see `http_protocol`."""


class Endpoints:
    """The routes under /v1, and those that tokenise."""

    def __init__(self, surface: Surface) -> None:
        self._surface = surface

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        for path, endpoint in {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.completions,
            "/invocations": self.invocations,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }.items():
            app.add_api_route(path, endpoint, methods=["POST"], response_model=None)
        app.add_api_route("/v1/models", self.models, methods=["GET"], response_model=None)
        app.add_api_route(
            "/v1/models/{name:path}", self.model, methods=["GET"], response_model=None
        )

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        names = self._surface.info.served_model_names
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        name = request.path_params["name"]
        self._surface.check_model(name)
        return JSONResponse(self._card(name))

    async def invocations(self, request: Request) -> Response:
        """POST /invocations: what the fields ask for."""
        body = await self._body(request)
        if "messages" in body:
            return await self._chat(request, body)
        if "prompt" in body:
            return await self._completions(request, body)
        if "input" in body:
            return await other_task(request)
        raise RequestError("the body must have messages or prompt")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._chat(request, await self._body(request))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._completions(request, await self._body(request))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: a text, or a conversation as the chat template renders it."""
        surface = self._surface
        fields, headers = self._checked(TokenizeRequest, await self._body(request))
        surface.check_model(fields.model)
        prepare.check_template_kwargs(fields.chat_template_kwargs)
        tokens = await surface.in_thread(prepare.tokenized, fields, surface.inputs)
        return JSONResponse(
            {"tokens": tokens, "count": len(tokens), "max_model_len": surface.info.max_model_len},
            headers=headers,
        )

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of token ids."""
        surface = self._surface
        fields, headers = self._checked(DetokenizeRequest, await self._body(request))
        surface.check_model(fields.model)
        text = await surface.in_thread(
            prepare.detokenized, fields, surface.inputs, surface.info.vocab_size
        )
        return JSONResponse({"prompt": text}, headers=headers)

    async def _chat(self, request: Request, body: dict[str, Any]) -> Response:
        surface = self._surface
        fields, headers = self._checked(ChatRequest, body)
        model = self._check_generation(fields)
        item = await surface.in_thread(prepare.chat_input, fields, surface.inputs, surface.server)
        shape = ChatShape(fields, item, surface.inputs.tokenizer)
        return await self._generate(request, fields, [item], shape, model, headers)

    async def _completions(self, request: Request, body: dict[str, Any]) -> Response:
        surface = self._surface
        fields, headers = self._checked(CompletionRequest, body)
        model = self._check_generation(fields)
        items = await surface.in_thread(
            prepare.completion_inputs, fields, surface.inputs, surface.server
        )
        shape = CompletionShape(fields, items, surface.inputs.tokenizer)
        return await self._generate(request, fields, items, shape, model, headers)

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request, when work is taken at all."""
        self._surface.start()
        self._surface.check_open_for_work()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind and kind != "application/json" and not kind.endswith("+json"):
            raise ApiError(415, f"the body must be application/json, not {kind[:80]}")
        body = await request.body()
        max_depth = self._surface.server.max_json_depth
        if len(body) > _LARGE_BODY_BYTES:
            return await self._surface.in_thread(parse_object, body, max_depth)
        return parse_object(body, max_depth)

    def _checked(self, kind: type[Fields], body: dict[str, Any]) -> tuple[Fields, dict[str, str]]:
        """The fields, by type, and the header that names ignored ones (REQ-2, REQ-3)."""
        server = self._surface.server
        check_sizes(body, server)
        ignored = ignored_paths(body, kind.model_fields, strict=server.strict_params)
        headers = {"x-pagedcore-ignored-params": header_list(ignored)} if ignored else {}
        return kind.model_validate(body), headers

    def _check_generation(self, fields: GenerationRequest) -> str:
        surface = self._surface
        model = surface.check_model(fields.model)
        policy = surface.config.scheduler.scheduling_policy
        prepare.check_generation(fields, surface.server, policy)
        return model

    async def _generate(
        self,
        request: Request,
        fields: GenerationRequest,
        items: Sequence[EngineInput],
        shape: Shape,
        model: str,
        headers: dict[str, str],
    ) -> Response:
        surface = self._surface
        server = surface.server
        used = prepare.used_max_tokens(fields, items)
        if used is not None:
            headers["x-pagedcore-adjusted-params"] = f"max_tokens={used}"
        answer = Answer(
            surface.client,
            surface.inputs.tokenizer,
            items,
            priority=fields.priority or 0,
            cache_salt=fields.cache_salt,
            interval=server.stream_interval,
            every_token=bool(fields.return_token_ids),
            deadline=request.scope["state"][DEADLINE],
            arrival=request.scope["state"][ARRIVAL],
            slot=surface.slot,
            on_overflow=request.scope.get("extensions", {}).get(ABORT),
        )
        envelope = {
            "id": shape.id_prefix + _request_id(request, fields),
            "object": shape.chunk_object if fields.stream else shape.whole_object,
            "created": int(time.time()),
            "model": model,
        }
        try:
            if not fields.stream:
                work = self._whole(answer, shape, envelope, headers)
                return await surface.run(request.receive, work)
            await surface.run(request.receive, answer.admitted())
        except ClientGoneError:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        options = fields.stream_options
        forced = server.enable_force_include_usage
        return EventStream(
            surface,
            answer,
            shape,
            envelope,
            headers,
            include_usage=forced or bool(options and options.include_usage),
            continuous_usage=forced or bool(options and options.continuous_usage_stats),
        )

    async def _whole(
        self, answer: Answer, shape: Shape, envelope: dict[str, Any], headers: dict[str, str]
    ) -> Response:
        await answer.admitted()
        try:
            pieces = await answer.whole()
        except EngineDeadError as error:
            raise as_api_error(error, admitted=True) from error
        body = {
            **envelope,
            "choices": [shape.choice(piece) for piece in pieces],
            "usage": answer.usage.as_dict(
                with_details=self._surface.server.enable_prompt_tokens_details
            ),
            **shape.top_level(pieces),
        }
        return Response(msgspec.json.encode(body), 200, headers, media_type="application/json")

    def _card(self, name: str) -> dict[str, Any]:
        info = self._surface.info
        return {
            "id": name,
            "object": "model",
            "created": self._surface.created,
            "owned_by": "pagedcore",
            "root": info.served_model_names[0],
            "parent": None,
            "max_model_len": info.max_model_len,
        }


def _request_id(request: Request, fields: GenerationRequest) -> str:
    """The header's, else the field's, else the one that was generated (STREAM-1)."""
    state = request.scope["state"]
    asked = valid_request_id(request.headers.get("x-request-id"))
    state[REQUEST_ID] = asked or valid_request_id(fields.request_id) or state[REQUEST_ID]
    request_id: str = state[REQUEST_ID]
    return request_id
