"""/v1/responses: answers that can be asked for again, gone on from, and made in the background."""

import asyncio
import uuid
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from pagedcore.errors import EngineDeadError, RequestError
from pagedcore_openai import prepare
from pagedcore_openai.answer import Answer
from pagedcore_openai.endpoints import CLIENT_CLOSED_REQUEST
from pagedcore_openai.errors import ApiError, as_api_error
from pagedcore_openai.event_stream import EventStream
from pagedcore_openai.gate import KEY
from pagedcore_openai.intake import Intake
from pagedcore_openai.openapi import describe
from pagedcore_openai.pieces import Piece
from pagedcore_openai.protocol import ResponseRequest
from pagedcore_openai.request_trace import trace_of
from pagedcore_openai.response_input import as_chat, check_response, input_messages, renamed
from pagedcore_openai.response_shape import ResponseEvents, ResponseShape
from pagedcore_openai.response_store import ResponseStore, StoredResponse
from pagedcore_openai.surface import ClientGoneError, Surface


class Responses:
    """The routes of responses. They are stored in this process, and lost when it ends."""

    def __init__(self, surface: Surface, intake: Intake, store: ResponseStore) -> None:
        self._surface = surface
        self._intake = intake
        self._store = store

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        about = describe(ResponseRequest, works=True, streams=True)
        app.add_api_route("/v1/responses", self.create, methods=["POST"], **about)
        path = "/v1/responses/{response_id}"
        about = describe(refusals=(404,))
        app.add_api_route(path, self.retrieve, methods=["GET"], **about)
        app.add_api_route(path, self.delete, methods=["DELETE"], **about)
        about = describe(refusals=(400, 404))
        app.add_api_route(f"{path}/cancel", self.cancel, methods=["POST"], **about)

    async def create(self, request: Request) -> Response:
        """Answer an input."""
        surface = self._surface
        fields, headers = self._intake.checked(ResponseRequest, await self._intake.body(request))
        check_response(fields)
        self._check_stored_here(fields)
        stored = self._prepared(request, fields)
        chat = as_chat(fields, stored.messages)
        with renamed():
            model = self._intake.check_generation(chat)
            item = await surface.in_thread(prepare.chat_input, chat, surface.inputs, surface.server)
        answer = self._intake.answer(request, chat, [item], headers)
        response_id = f"resp_{uuid.uuid4().hex}"
        shape = ResponseShape(response_id, fields, model, item.params.max_tokens or 0)
        try:
            if not fields.background and not fields.stream:
                work = self._whole(answer, shape, stored, fields, headers)
                return await surface.run(request.scope, request.receive, work)
            await surface.run(request.scope, request.receive, answer.admitted())
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        stored.body = shape.body("in_progress")
        if fields.store is not False:
            self._store.add(stored)
        if fields.stream:
            return _ResponseStream(surface, answer, headers, shape, stored)
        stored.task = surface.spawn(self._in_background(answer, shape, stored))
        trace = trace_of(request)
        if trace is not None:
            trace.work = stored.task
        return JSONResponse(stored.body, headers=headers)

    async def retrieve(self, request: Request) -> Response:
        """A stored response as it is now."""
        if request.query_params.get("stream", "false") != "false":
            raise ApiError(501, "a stored response cannot be streamed: poll for it", "stream")
        return JSONResponse(self._find(request).body)

    async def delete(self, request: Request) -> Response:
        """Forget a stored response; work on it ends."""
        stored = self._find(request)
        self._store.remove(stored.body["id"], stored.key)
        return JSONResponse({"id": stored.body["id"], "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """End the work on a background response; one that is over stays as it is."""
        stored = self._find(request)
        if not stored.body["background"]:
            raise RequestError("only background responses can be cancelled: close the connection")
        if stored.task is not None and not stored.task.done():
            stored.task.cancel()
            await asyncio.wait([stored.task])
        return JSONResponse(stored.body)

    def _check_stored_here(self, fields: ResponseRequest) -> None:
        """Refuse what needs a stored response where the next request may meet another process."""
        for name in ("background", "previous_response_id"):
            if getattr(fields, name) and self._surface.server.num_api_servers != 1:
                raise ApiError(501, f"{name} needs a server with --num-api-servers 1", name)

    def _find(self, request: Request) -> StoredResponse:
        return self._store.find(request.path_params["response_id"], request.scope["state"][KEY])

    def _prepared(self, request: Request, fields: ResponseRequest) -> StoredResponse:
        """The conversation that a request goes on with."""
        key = request.scope["state"][KEY]
        messages = input_messages(fields.input)
        if fields.previous_response_id is not None:
            param = "previous_response_id"
            before = self._store.find(fields.previous_response_id, key, param)
            if before.body["status"] == "in_progress":
                raise RequestError("the previous response is not complete yet", param)
            messages = [*before.messages, *messages]
        return StoredResponse(key, {}, messages)

    async def _whole(
        self,
        answer: Answer,
        shape: ResponseShape,
        stored: StoredResponse,
        fields: ResponseRequest,
        headers: dict[str, str],
    ) -> Response:
        await answer.admitted()
        try:
            (piece,) = await answer.whole()
        except EngineDeadError as error:
            raise as_api_error(error, admitted=True) from error
        complete(stored, shape.body("completed", piece, answer.usage), piece.text)
        if fields.store is not False:
            self._store.add(stored)
        body = msgspec.json.encode(stored.body)
        return Response(body, 200, headers, media_type="application/json")

    async def _in_background(
        self, answer: Answer, shape: ResponseShape, stored: StoredResponse
    ) -> None:
        whole = Piece(0)
        try:
            async for piece in answer.pieces():
                whole.extend(piece)
            complete(stored, shape.body("completed", whole, answer.usage), whole.text)
        except asyncio.CancelledError:
            stored.body = shape.body("cancelled", whole, answer.usage)
            raise
        except Exception as error:
            failure = as_api_error(error, admitted=True)
            stored.body = shape.body("failed", whole, answer.usage, failure)
        finally:
            answer.close()


class _ResponseStream(EventStream):
    """The events of a response, and what is stored of it."""

    def __init__(
        self,
        surface: Surface,
        answer: Answer,
        headers: dict[str, str],
        shape: ResponseShape,
        stored: StoredResponse,
    ) -> None:
        super().__init__(surface, answer, headers)
        self._shape = shape
        self._stored = stored
        self._events_of = ResponseEvents(shape)
        self._whole = Piece(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; without a reader it is cancelled."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._stored.body["status"] == "in_progress":
                usage = self._answer.usage
                self._stored.body = self._shape.body("cancelled", self._whole, usage)

    def beginning(self) -> bytes:
        """See `ResponseEvents`."""
        return self._events_of.beginning()

    def events_of(self, piece: Piece) -> bytes:
        """A delta, where there is text."""
        self._whole.extend(piece)
        return self._events_of.delta(piece.text) if piece.text else b""

    def ending(self) -> bytes:
        """The whole, in every form."""
        body = self._shape.body("completed", self._whole, self._answer.usage)
        complete(self._stored, body, self._whole.text)
        return self._events_of.ending(body)

    def failure(self, error: ApiError) -> bytes:
        """The response, with its error."""
        body = self._shape.body("failed", self._whole, self._answer.usage, error)
        self._stored.body = body
        return self._events_of.failure(body)

    def last_words(self) -> bytes:
        """The response, cut off because the server ends."""
        return self.failure(ApiError(503, "the server is shutting down"))


def complete(stored: StoredResponse, body: dict[str, Any], text: str) -> None:
    """Keep a response that is over, for others to go on from."""
    stored.body = body
    stored.messages = [*stored.messages, {"role": "assistant", "content": text}]
