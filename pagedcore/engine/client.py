"""The front end's way to an engine in another process, for one asyncio loop."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedcore.engine import wire
from pagedcore.engine.generation import Choice, Chunk, Generation
from pagedcore.engine.info import EngineInfo
from pagedcore.engine.link import PING, Link
from pagedcore.errors import EngineDeadError, OverloadedError, RequestError
from pagedcore.pooling import PoolingParams
from pagedcore.request import SamplingParams

__all__ = ["Chunk", "EngineClient", "Generation"]


class EngineClient:
    """Sends requests to an `EngineServer` and hands out what comes back.

    An engine that dies or stops answering ends every open generation with EngineDeadError; when
    one answers at the same address again, work goes on. Not thread-safe: one per event loop.
    """

    def __init__(
        self, address: str, *, max_inflight: int = 16384, max_queued_tokens: int = 4096
    ) -> None:
        """Nothing is opened before the first `await`.

        :param address: path of the server's socket.
        :param max_inflight: most sequences that have not ended.
        :param max_queued_tokens: how far behind the reader of one choice may fall.
        """
        self._address = address
        self._max_inflight = max_inflight
        self._max_queued_tokens = max_queued_tokens
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: Link | None = None
        self._why_lost = ""
        self._next_id = 0
        self._next_call = PING
        self._choices: dict[int, Choice] = {}
        self._asked: dict[int, Generation] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}

    async def start(self) -> None:
        """Begin to connect, and reconnect for ever; returns after the first attempt.

        Other methods do this themselves when they are the first.
        """
        await self._started().tried.wait()

    async def wait_ready(self) -> EngineInfo:
        """Wait until an engine answers, however long that takes."""
        await self._started().connected.wait()
        return self.info

    async def close(self) -> None:
        """Disconnect; what is in flight is aborted."""
        if self._link is not None:
            await self._link.close()

    @property
    def ready(self) -> bool:
        """Whether an engine answers."""
        return self._link is not None and self._link.connected.is_set()

    @property
    def dead(self) -> bool:
        """Whether an engine has answered before and does no more."""
        return not self.ready and self._link is not None and self._link.welcome is not None

    @property
    def num_inflight(self) -> int:
        """Sequences that have not ended."""
        return len(self._choices)

    @property
    def info(self) -> EngineInfo:
        """What the engine serves; raises OverloadedError ("not_ready") before it has answered."""
        if self._link is None or self._link.welcome is None:
            raise OverloadedError("the engine is loading", "not_ready")
        return self._link.welcome.info

    def generate(
        self,
        prompt_token_ids: Sequence[int] | NDArray[np.int32],
        params: SamplingParams,
        *,
        eos_token_id: int = -1,
        bad_words_token_ids: Sequence[Sequence[int]] = (),
        priority: int = 0,
        cache_salt: str | None = None,
        owner: str = "",
        adapter: str | None = None,
        on_overflow: Callable[[], None] | None = None,
    ) -> Generation:
        """Prepare a request of `params.n` choices; see `Generation`. Nothing is sent yet.

        `owner`, of at most 64 characters, is who shares under the scheduling policy `fair`;
        `adapter` is the name of one that the engine has loaded.
        `on_overflow` is called, in the loop, when the reader has fallen too far behind and the
        request was aborted: whoever waits for a slow connection can be cancelled there.
        Raises RequestError for token ids that are no 32-bit integers.
        """
        prompt = _token_bytes(prompt_token_ids)
        bad_words = tuple(map(tuple, bad_words_token_ids))
        request = wire.Add(
            self._next_id,
            prompt,
            params,
            eos_token_id,
            bad_words,
            priority,
            cache_salt,
            owner=owner,
            adapter=adapter,
        )
        self._next_id += params.n
        return Generation(
            self, request, max_queued_tokens=self._max_queued_tokens, on_overflow=on_overflow
        )

    def pool(
        self,
        prompt_token_ids: Sequence[int] | NDArray[np.int32],
        pooling: PoolingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Generation:
        """Prepare a request for a vector: the one chunk of the generation has it."""
        request = wire.Add(
            self._next_id,
            _token_bytes(prompt_token_ids),
            SamplingParams(max_tokens=1),
            -1,
            priority=priority,
            cache_salt=cache_salt,
            pooling=pooling,
        )
        self._next_id += 1
        return Generation(
            self, request, max_queued_tokens=self._max_queued_tokens, on_overflow=None
        )

    async def embed(
        self,
        prompt_token_ids: Sequence[int] | NDArray[np.int32],
        pooling: PoolingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> NDArray[np.float32]:
        """The vector [n] of a prompt; what `pooling` leaves open is the model's own way.

        Cancelling it aborts the request. Raises what `generate` does, and RuntimeError where the
        engine failed on this request.
        """
        generation = self.pool(
            prompt_token_ids, pooling or PoolingParams(), priority=priority, cache_salt=cache_salt
        )
        async with generation:
            async for chunk in generation:
                if chunk.vector is not None:
                    return chunk.vector
                raise RuntimeError(chunk.message or "the engine gave no vector")
        raise RuntimeError("the engine gave no vector")

    async def call(self, name: str, /, *, timeout_s: float = 5.0, **arguments: Any) -> Any:
        """Ask the engine for `ping`, `stats`, `reset_prefix_cache`, `adapters`, `load_adapter`
        (`name`, `folder`) or `unload_adapter` (`name`).

        A ping is answered at once, the others between two steps. Raises EngineDeadError or
        OverloadedError ("not_ready") without an engine, TimeoutError without an answer in time,
        and RequestError for what the engine does not know.
        """
        await self.start()
        link = self._connected()
        self._next_call += 1
        call_id = self._next_call
        answer = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        try:
            link.send(wire.encode(wire.Call(call_id, name, arguments)))
            return await asyncio.wait_for(answer, timeout_s)
        finally:
            del self._calls[call_id]

    def open(self, generation: Generation, request: wire.Add, choices: Sequence[Choice]) -> None:
        """Send a generation's request; raises OverloadedError or EngineDeadError."""
        link = self._connected()
        if len(self._choices) + len(choices) > self._max_inflight:
            raise OverloadedError(
                f"{len(self._choices)} sequences of this front end are in flight already",
                "queued_reqs",
            )
        frame = wire.encode(request)
        self._asked[request.id] = generation
        for choice in choices:
            self._choices[request.id + choice.index] = choice
        link.send(frame)

    def release(self, first_id: int, choices: Sequence[Choice]) -> None:
        """Forget choices of a generation, and abort those that have not ended."""
        self._asked.pop(first_id, None)
        ids = [first_id + choice.index for choice in choices]
        live = [i for i in ids if self._choices.pop(i, None) is not None]
        if live and self._link is not None:
            self._link.send(wire.encode(wire.Abort(live)))

    def _started(self) -> Link:
        loop = asyncio.get_running_loop()
        if self._link is None:
            self._loop = loop
            self._link = Link(self._address, self._take, self._lost)
        elif self._loop is not loop:
            raise RuntimeError("an EngineClient belongs to the event loop that it was started in")
        return self._link

    def _connected(self) -> Link:
        if self._link is not None and self.ready:
            return self._link
        if self.dead:
            raise EngineDeadError(self._why_lost)
        raise OverloadedError("the engine is loading", "not_ready")

    def _lost(self, reason: str) -> None:
        """Everything in flight ends with an error; the server drops it when the link closes."""
        self._why_lost = reason
        generations = {choice.generation for choice in self._choices.values()}
        self._choices.clear()
        self._asked.clear()
        for generation in generations:
            generation.fail(EngineDeadError(reason))
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(reason))

    def _take(self, message: wire.FromServer) -> None:
        match message:
            case wire.Outputs():
                self._take_outputs(message)
            case wire.Admitted(id=i):
                if i in self._asked:
                    self._asked.pop(i).admit()
            case wire.Refused(id=i, failure=failure):
                if i in self._asked:
                    generation = self._asked.pop(i)
                    for k in range(i, i + generation.num_choices):
                        self._choices.pop(k, None)
                    generation.fail(wire.exception_of(failure))
            case wire.Reply(id=i, value=value, failure=failure):
                answer = self._calls.get(i)
                if answer is None or answer.done():
                    return
                if failure is None:
                    answer.set_result(value)
                else:
                    answer.set_exception(wire.exception_of(failure))

    def _take_outputs(self, step: wire.Outputs) -> None:
        choices = self._choices
        for i, count in step.num_cached_tokens.items():
            if i in choices:
                choices[i].chunk.num_cached_tokens = count
        for i, seconds in step.queue_seconds.items():
            if i in choices:
                choices[i].chunk.queue_seconds = seconds
        for i, entries in step.prompt_logprobs.items():
            if i in choices:
                choices[i].add_prompt_logprobs(entries)
        for i, entry in step.logprobs.items():
            if i in choices:
                choices[i].add_logprobs(entry)
        for i, vector in step.vectors.items():
            if i in choices:
                choices[i].chunk.vector = np.frombuffer(vector, np.float32)
        ids = np.frombuffer(step.ids, np.int64).tolist()
        tokens = np.frombuffer(step.tokens, np.int32).tolist()
        for i, token in zip(ids, tokens, strict=True):
            choice = choices.get(i)
            if choice is not None:
                choice.add_token(token)
        for end in step.finished:
            ended = choices.pop(end.request_id, None)
            if ended is not None:
                ended.finish(end)


def _token_bytes(token_ids: Sequence[int] | NDArray[np.int32]) -> bytes:
    """As int32; checked here, because numpy would cut floats and let large integers wrap."""
    try:
        array = np.asarray(token_ids)
    except (OverflowError, ValueError, TypeError):  # such as lists of different lengths
        array = np.empty((0, 0))
    if array.shape == (0,):  # an engine says what is wrong with it
        return b""
    limits = np.iinfo(np.int32)
    if (
        array.ndim != 1
        or array.dtype.kind not in "iu"
        or array.min() < limits.min
        or array.max() > limits.max
    ):
        raise RequestError("the prompt must be a list of 32-bit integer token ids", "prompt")
    return array.astype(np.int32, copy=False).tobytes()
