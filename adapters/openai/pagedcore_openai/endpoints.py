"""What each inference route does: check, prepare, run, shape."""

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pagedcore.errors import EngineDeadError, RequestError
from pagedcore.text.inputs import EngineInput
from pagedcore_openai import prepare
from pagedcore_openai.answer import Answer
from pagedcore_openai.chat import ChatShape
from pagedcore_openai.completions import CompletionShape
from pagedcore_openai.errors import as_api_error
from pagedcore_openai.event_stream import ChunkStream, Shape
from pagedcore_openai.intake import Intake, settled_request_id
from pagedcore_openai.openapi import describe
from pagedcore_openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from pagedcore_openai.surface import ClientGoneError, Surface
from pagedcore_openai.vectors import Vectors

CLIENT_CLOSED_REQUEST = 499
"""The status that nobody is there to read."""


class Endpoints:
    """The routes under /v1, and those that tokenise."""

    def __init__(self, surface: Surface, intake: Intake) -> None:
        self._surface = surface
        self._intake = intake
        self._vectors = Vectors(surface, intake)

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        self._vectors.add_to(app)
        for path, endpoint, kind in (
            ("/v1/chat/completions", self.chat, ChatRequest),
            ("/v1/completions", self.completions, CompletionRequest),
            ("/invocations", self.invocations, None),
            ("/tokenize", self.tokenize, TokenizeRequest),
            ("/detokenize", self.detokenize, DetokenizeRequest),
        ):
            streams = kind is None or issubclass(kind, GenerationRequest)
            about = describe(kind, streams=streams, works=True)
            app.add_api_route(path, endpoint, methods=["POST"], **about)
        app.add_api_route("/v1/models", self.models, methods=["GET"], **describe())
        about = describe(refusals=(404,))
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"], **about)

    async def models(self, request: Request) -> Response:
        """The names that requests may use."""
        names = [*self._surface.info.served_model_names, *await self._surface.adapters()]
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """One of the names that requests may use."""
        name = request.path_params["name"]
        await self._surface.check_known(name)
        return JSONResponse(self._card(name))

    async def invocations(self, request: Request) -> Response:
        """What the fields ask for: `messages` a chat, `prompt` a completion, `input` vectors."""
        body = await self._intake.body(request)
        if "messages" in body:
            return await self._chat(request, body)
        if "prompt" in body:
            return await self._completions(request, body)
        if "input" in body:
            return await self._vectors.embed(request, body)
        raise RequestError("the body must have messages, prompt or input")

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._chat(request, await self._intake.body(request))

    async def completions(self, request: Request) -> Response:
        """Go on with one or several prompts."""
        return await self._completions(request, await self._intake.body(request))

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text, or of a conversation as the chat template renders it."""
        surface = self._surface
        fields, headers = self._intake.checked(TokenizeRequest, await self._intake.body(request))
        await surface.check_known(fields.model)
        prepare.check_template_kwargs(fields.chat_template_kwargs)
        tokens = await surface.in_thread(prepare.tokenized, fields, surface.inputs)
        return JSONResponse(
            {"tokens": tokens, "count": len(tokens), "max_model_len": surface.info.max_model_len},
            headers=headers,
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        surface = self._surface
        fields, headers = self._intake.checked(DetokenizeRequest, await self._intake.body(request))
        await surface.check_known(fields.model)
        text = await surface.in_thread(
            prepare.detokenized, fields, surface.inputs, surface.info.vocab_size
        )
        return JSONResponse({"prompt": text}, headers=headers)

    async def _chat(self, request: Request, body: dict[str, Any]) -> Response:
        surface = self._surface
        fields, headers = self._intake.checked(ChatRequest, body)
        model = self._intake.check_generation(fields)
        item = await surface.in_thread(prepare.chat_input, fields, surface.inputs, surface.server)
        shape = ChatShape(fields, item, surface.inputs.tokenizer)
        return await self._generate(request, fields, [item], shape, model, headers)

    async def _completions(self, request: Request, body: dict[str, Any]) -> Response:
        surface = self._surface
        fields, headers = self._intake.checked(CompletionRequest, body)
        model = self._intake.check_generation(fields)
        arguments = fields, surface.inputs, surface.server
        if prepare.is_quick(fields):
            items = prepare.completion_inputs(*arguments)
        else:
            items = await surface.in_thread(prepare.completion_inputs, *arguments)
        shape = CompletionShape(fields, items, surface.inputs.tokenizer)
        return await self._generate(request, fields, items, shape, model, headers)

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
        answer = self._intake.answer(request, fields, items, headers)
        envelope = {
            "id": shape.id_prefix + settled_request_id(request, fields),
            "object": shape.chunk_object if fields.stream else shape.whole_object,
            "created": int(time.time()),
            "model": model,
        }
        try:
            if not fields.stream:
                work = self._whole(answer, shape, envelope, headers)
                return await surface.run(request.scope, request.receive, work)
            await surface.run(request.scope, request.receive, answer.admitted())
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        options = fields.stream_options
        forced = surface.server.enable_force_include_usage
        return ChunkStream(
            surface,
            answer,
            headers,
            shape,
            envelope,
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
        is_adapter = name not in info.served_model_names
        return {
            "id": name,
            "object": "model",
            "created": self._surface.created,
            "owned_by": "pagedcore",
            "root": name if is_adapter else info.served_model_names[0],
            "parent": info.served_model_names[0] if is_adapter else None,
            "max_model_len": info.max_model_len,
        }
