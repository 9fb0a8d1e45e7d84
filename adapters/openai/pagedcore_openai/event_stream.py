"""Server-sent events: an answer's pieces as they come (semantics 5.3)."""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import msgspec
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagedcore.errors import OverloadedError
from pagedcore.request import FinishReason
from pagedcore_openai.answer import Answer
from pagedcore_openai.errors import ApiError, as_api_error
from pagedcore_openai.pieces import Piece
from pagedcore_openai.surface import ClientGoneError, Surface

_encode = msgspec.json.Encoder().encode


class Shape(Protocol):
    """How an endpoint's answers look."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        ...

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The choices of the chunks that tell a piece."""
        ...

    def top_level(self, pieces: list[Piece]) -> dict[str, Any]:
        """What a whole answer has beside its choices."""
        ...


class EventStream(Response, ABC):
    """Streams an answer that the engine has admitted; a subclass says what its events are."""

    END = b""
    """What every stream ends with."""

    def __init__(self, surface: Surface, answer: Answer, headers: Mapping[str, str]) -> None:
        self.status_code = 200
        self.media_type = "text/event-stream"
        self.background: BackgroundTask | None = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", **headers})
        del self.headers["content-length"]
        self._surface = surface
        self._answer = answer
        self._rest = b""
        """What is sent together with the end."""

    @abstractmethod
    def events_of(self, piece: Piece) -> bytes:
        """The events that tell a piece; empty for none."""

    @abstractmethod
    def failure(self, error: ApiError) -> bytes:
        """The last events of an answer that failed."""

    @abstractmethod
    def last_words(self) -> bytes:
        """The last events of an answer that was aborted because the server ends."""

    def beginning(self) -> bytes:
        """Events before the first piece."""
        return b""

    def ending(self) -> bytes:
        """Events after the last piece of an answer that succeeded."""
        return b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; what has not ended is aborted when its reader goes away."""
        with contextlib.suppress(ClientGoneError):
            await self._surface.run(scope, receive, self._write(send))

    async def _write(self, send: Send) -> None:
        beat = _Heart(send, self._surface.server.sse_keepalive_interval)
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        beat.start()
        try:
            async for events in self._events():
                beat.touch()
                await send({"type": "http.response.body", "body": events, "more_body": True})
        except asyncio.CancelledError:
            if not self._surface.aborting:
                raise
            self._rest += self.last_words()
        finally:
            self._answer.close()
            beat.stop()
        rest = self._rest + self.END
        await send({"type": "http.response.body", "body": rest, "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            if beginning := self.beginning():
                yield beginning
            async for piece in self._answer.pieces():
                events = self.events_of(piece)
                if not self._answer.live:  # nothing comes after it
                    self._rest = events
                elif events:
                    yield events
        except OverloadedError as error:
            if error.reason == "slow_reader":
                raise ClientGoneError from error  # it does not read an error either
            self._rest += self.failure(as_api_error(error))
        except Exception as error:
            self._rest += self.failure(as_api_error(error, admitted=True))
        else:
            self._rest += self.ending()


class ChunkStream(EventStream):
    """The chunks of chat and completions."""

    END = b"data: [DONE]\n\n"

    def __init__(
        self,
        surface: Surface,
        answer: Answer,
        headers: Mapping[str, str],
        shape: Shape,
        envelope: Mapping[str, Any],
        *,
        include_usage: bool,
        continuous_usage: bool,
    ) -> None:
        """`envelope` is what all chunks have in common: id, object, created, model."""
        super().__init__(surface, answer, headers)
        self._shape = shape
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._details = surface.server.enable_prompt_tokens_details
        self._head = b"data: " + _encode(envelope)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def events_of(self, piece: Piece) -> bytes:
        """A chunk, or two for the first of a chat's choice."""
        tail = self._tail
        if self._continuous_usage:
            tail = b"]," + self._usage() + b"}\n\n"
        chunks = self._shape.chunks(piece)
        return b"".join([self._head + _encode(choice) + tail for choice in chunks])

    def failure(self, error: ApiError) -> bytes:
        """The error, as every other one (STREAM-6)."""
        return b"data: " + error.body() + b"\n\n"

    def last_words(self) -> bytes:
        """An end for each choice that has none (LIFE-4)."""
        live = sorted(self._answer.live)
        pieces = [Piece(index, finish_reason=FinishReason.ABORT) for index in live]
        return b"".join(map(self.events_of, pieces))

    def ending(self) -> bytes:
        """The usage, if it was asked for (USAGE-1)."""
        return self._head + b"]," + self._usage() + b"}\n\n" if self._include_usage else b""

    def _usage(self) -> bytes:
        return b'"usage":' + _encode(self._answer.usage.as_dict(with_details=self._details))


class _Heart:
    """Sends comments while a stream is silent, so that proxies keep it open (STREAM-7)."""

    def __init__(self, send: Send, interval_s: float) -> None:
        self._send = send
        self._interval_s = interval_s
        self._silent = True
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._interval_s > 0:
            self._task = asyncio.create_task(self._beat())

    def touch(self) -> None:
        self._silent = False

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _beat(self) -> None:
        comment = {"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True}
        while True:
            await asyncio.sleep(self._interval_s)
            if self._silent:
                await self._send(comment)
            self._silent = True
