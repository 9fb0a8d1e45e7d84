"""One request as its front end sees it: tokens of n choices, gathered until they are read."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from pagedcore.engine.wire import Add, PackedLogprobs, unpack_logprobs
from pagedcore.errors import OverloadedError
from pagedcore.request import FinishReason
from pagedcore.step import Finished, TokenLogprobs

if TYPE_CHECKING:
    from pagedcore.engine.client import EngineClient


@dataclass(slots=True)
class Chunk:
    """What is new of one choice since its last chunk: the tokens of one or several steps."""

    index: int
    """Which of the n choices."""

    token_ids: list[int]
    """New tokens, the one that ended the choice included; may be empty in its last chunk."""

    finish_reason: FinishReason | None = None
    """Set in the choice's last chunk."""

    stop_reason: int | None = None
    """The stop token id that ended it, where one did."""

    message: str | None = None
    """Why, when `finish_reason` is ERROR."""

    logprobs: list[TokenLogprobs] | None = None
    """One entry per token, when asked for."""

    prompt_logprobs: list[TokenLogprobs] | None = None
    """The next prompt tokens' entries, from the second token on, when asked for."""

    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache, in the first chunk of the choice that knows."""

    queue_seconds: float | None = None
    """How long the prompt waited to be scheduled first, in the same chunk."""

    vector: NDArray[np.float32] | None = None
    """[n] What a request for a vector gets, with `finish_reason`."""


class Choice:
    """One of n sequences: what has arrived and was not read yet."""

    __slots__ = ("chunk", "generation", "index", "queued")

    def __init__(self, generation: "Generation", index: int) -> None:
        self.generation = generation
        self.index = index
        self.chunk = Chunk(index, [])
        self.queued = False

    def add_token(self, token_id: int) -> None:
        """Take one token of a step."""
        tokens = self.chunk.token_ids
        tokens.append(token_id)
        if not self.queued:
            self.generation.wake(self)
        elif len(tokens) > self.generation.max_queued_tokens:
            self.generation.overflow()

    def add_logprobs(self, entry: PackedLogprobs) -> None:
        """Take the log-probabilities of the token that comes with them."""
        if self.chunk.logprobs is None:
            self.chunk.logprobs = []
        self.chunk.logprobs.append(unpack_logprobs(entry))

    def add_prompt_logprobs(self, entries: Sequence[PackedLogprobs]) -> None:
        """Take a piece of the prompt's log-probabilities; they leave with the next token."""
        if self.chunk.prompt_logprobs is None:
            self.chunk.prompt_logprobs = []
        self.chunk.prompt_logprobs += map(unpack_logprobs, entries)

    def finish(self, end: Finished) -> None:
        """Take the end."""
        self.chunk.finish_reason = FinishReason(end.reason)
        self.chunk.stop_reason = end.stop_reason
        self.chunk.message = end.message
        if not self.queued:
            self.generation.wake(self)

    def take(self) -> Chunk:
        """Hand over what has gathered."""
        chunk, self.chunk = self.chunk, Chunk(self.index, [])
        self.queued = False
        return chunk


class Generation:
    """An asynchronous iterator of `Chunk`s; leaving it aborts what has not finished.

        async with client.generate(prompt_token_ids, params, eos_token_id=2) as generation:
            await generation.admitted()
            async for chunk in generation: ...

    Nothing is sent before `admitted()` or the first item is awaited. Iterate once only. An engine
    that dies raises EngineDeadError; a reader that falls behind, OverloadedError ("slow_reader").
    """

    def __init__(
        self,
        client: "EngineClient",
        request: Add,
        *,
        max_queued_tokens: int,
        on_overflow: Callable[[], None] | None,
    ) -> None:
        self.num_choices = request.params.n
        self.max_queued_tokens = max_queued_tokens
        self._client = client
        self._request = request
        self._on_overflow = on_overflow
        self._admission: asyncio.Future[None] | None = None
        self._live: dict[int, Choice] = {}
        self._ready: deque[Choice] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._closed = False

    async def admitted(self) -> None:
        """Wait until the engine has taken the request; cancelling this aborts it.

        Raises RequestError, OverloadedError or EngineDeadError when it has not (STREAM-6).
        """
        try:
            if self._admission is None:
                await self._client.start()
                self._admission = self._open()
            await self._admission
        except BaseException:
            self.close()
            raise

    def _open(self) -> asyncio.Future[None]:
        if self._closed:
            raise RuntimeError("this generation was closed")
        self._live = {i: Choice(self, i) for i in range(self.num_choices)}
        self._client.open(self, self._request, list(self._live.values()))
        return asyncio.get_running_loop().create_future()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield what is new, choice by choice, until all have ended."""
        try:
            await self.admitted()
            while self._live:
                if self._error is not None:
                    raise self._error
                if not self._ready:
                    self._reader = asyncio.get_running_loop().create_future()
                    await self._reader
                    continue
                choice = self._ready.popleft()
                if choice.index not in self._live:  # stopped meanwhile
                    continue
                chunk = choice.take()
                if chunk.finish_reason is not None:
                    del self._live[choice.index]
                yield chunk
        finally:
            self.close()

    def stop(self, index: int) -> None:
        """End one choice, such as at a stop string; nothing more of it is yielded."""
        choice = self._live.pop(index, None)
        if choice is not None:
            self._client.release(self._request.id, [choice])

    def close(self) -> None:
        """Abort what has not finished; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        choices = list(self._live.values())
        self._live.clear()
        self._client.release(self._request.id, choices)

    async def aclose(self) -> None:
        """The same as `close`, for those who await it."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # What the client calls:

    def admit(self) -> None:
        """The engine has taken the request."""
        if self._admission is not None and not self._admission.done():
            self._admission.set_result(None)

    def fail(self, error: Exception) -> None:
        """Nothing more will come; readers get `error`."""
        self._error = error
        if self._admission is not None and not self._admission.done():
            self._admission.set_exception(error)
            self._admission.exception()  # the one who waits may be gone; that is no news
        self._wake_reader()

    def wake(self, choice: Choice) -> None:
        """`choice` has something to read."""
        choice.queued = True
        self._ready.append(choice)
        self._wake_reader()

    def overflow(self) -> None:
        """The reader has fallen too far behind (semantics STREAM-10)."""
        if self._error is not None:
            return
        self.fail(
            OverloadedError(
                f"the reader is too slow: more than {self.max_queued_tokens} tokens wait for it",
                "slow_reader",
            )
        )
        self._client.release(self._request.id, list(self._live.values()))
        if self._on_overflow is not None:
            self._on_overflow()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
