"""The choices of one request on their way from tokens to text."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from pagedcore.engine.client import EngineClient
from pagedcore.engine.generation import Chunk, Generation
from pagedcore.request import FinishReason
from pagedcore.step import TokenLogprobs
from pagedcore.text.inputs import EngineInput
from pagedcore.text.output_text import OutputText
from pagedcore.text.tokenizer import Tokenizer
from pagedcore_openai.counters import Slot
from pagedcore_openai.errors import ApiError
from pagedcore_openai.timing import RequestTiming, now

MAX_QUEUED_TOKENS = 4096
"""How far behind the reader of one choice may fall (STREAM-10)."""

MAX_QUEUED_ENTRIES = 1 << 18
"""The same for a whole request, where each log-probability counts as much as a token."""


@dataclass(slots=True)
class Piece:
    """What is new of one choice."""

    index: int
    """Prompt index times n, plus the choice's own (STREAM-8)."""

    first: bool = False
    """Whether the choice has just got its first token; its text may be held back."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """The tokens that count: none after a stop string."""

    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One entry for each of `token_ids`, when asked for."""

    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One entry for each prompt token but the first, when asked for."""

    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def extend(self, later: "Piece") -> None:
        """Join what came after."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


@dataclass(slots=True)
class Usage:
    """What a request has cost so far (USAGE-3)."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_dict(self, *, with_details: bool) -> dict[str, object]:
        """In OpenAI's shape."""
        usage: dict[str, object] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if with_details:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return usage


class _Choice:
    """Holds text and tokens back until they make a piece (STREAM-3, STREAM-4)."""

    def __init__(self, index: int, output: OutputText, interval: int, every_token: bool) -> None:
        self._output = output
        self._interval = interval
        self._every_token = every_token
        self._started = False
        self._emitted = False
        self._pending = Piece(index)

    def take(self, chunk: Chunk) -> tuple[Piece, int]:
        """Add what the engine sent; all that waits, and how many of the new tokens count."""
        delta = self._output.push(chunk.token_ids, finish_reason=chunk.finish_reason)
        pending = self._pending
        pending.text += delta.text
        pending.token_ids += chunk.token_ids[: delta.num_tokens]
        if chunk.logprobs is not None:
            pending.logprobs += chunk.logprobs[: delta.num_tokens]
        if chunk.prompt_logprobs is not None:
            pending.prompt_logprobs += chunk.prompt_logprobs
        if delta.stop is not None:
            pending.finish_reason, pending.stop_reason = FinishReason.STOP, delta.stop
        else:
            pending.finish_reason, pending.stop_reason = chunk.finish_reason, chunk.stop_reason
        return pending, delta.num_tokens

    def release(self) -> Piece | None:
        """What may be sent now."""
        pending = self._pending
        first, self._started = not self._started, True
        has_news = bool(pending.text) or self._every_token
        enough = not self._emitted or len(pending.token_ids) >= self._interval
        if pending.finish_reason is None and not (has_news and enough):
            return Piece(pending.index, first=True) if first else None
        pending.first = first
        self._emitted = True
        self._pending = Piece(pending.index)
        return pending


class Answer:
    """Runs the prompts of one request, each with n choices.

    Leaving `pieces` early, or `close`, aborts whatever has not ended.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        inputs: Sequence[EngineInput],
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        interval: int = 1,
        every_token: bool = False,
        deadline: float | None = None,
        arrival: float,
        slot: Slot,
        on_overflow: Callable[[], None] | None = None,
    ) -> None:
        """Prepare; nothing is sent before `admitted`.

        :param interval: tokens that a piece waits for, after the first token (STREAM-4).
        :param every_token: whether tokens make a piece before they have made text.
        :param deadline: when everything must be there, in the event loop's time; else ApiError 408.
        :param arrival: when the request came, in the same time.
        :param slot: what counts and times are told to.
        :param on_overflow: called when nobody reads and the request was aborted (STREAM-10).
        """
        self.inputs = inputs
        self.num_choices = inputs[0].params.n
        self.usage = Usage(prompt_tokens=sum(len(i.prompt_token_ids) for i in inputs))
        self.live: set[int] = set(range(len(inputs) * self.num_choices))
        """Choices that have not ended."""
        self._generations = [
            client.generate(
                item.prompt_token_ids,
                item.params,
                eos_token_id=item.eos_token_id,
                bad_words_token_ids=item.bad_words_token_ids,
                priority=priority,
                cache_salt=cache_salt,
                on_overflow=on_overflow,
            )
            for item in inputs
        ]
        self._deadline = deadline
        self._timer: asyncio.TimerHandle | None = None
        self._slot = slot
        self._timings = [
            RequestTiming(slot, item.params, len(item.prompt_token_ids), arrival) for item in inputs
        ]
        self._num_cached = [0] * len(inputs)
        for generation in self._generations:
            generation.max_queued_tokens = _max_queued_tokens(inputs)
        self._choices = [
            _Choice(
                prompt * self.num_choices + index,
                OutputText(
                    tokenizer, item.prompt_token_ids, item.params, eos_token_id=item.eos_token_id
                ),
                interval,
                every_token,
            )
            for prompt, item in enumerate(inputs)
            for index in range(self.num_choices)
        ]

    async def admitted(self) -> None:
        """Wait until the engine has taken all prompts; raises what it refuses one with."""
        if self._deadline is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._deadline, self._expire)
        for timing in self._timings:
            timing.sent()
        try:
            await asyncio.gather(*(generation.admitted() for generation in self._generations))
        except BaseException:
            self.close()
            raise

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what is new until all choices have ended.

        Raises ApiError 500 where a choice failed, which ends the others, and what the engine
        raises.
        """
        try:
            async for prompt, chunk in _merged(self._generations):
                index = prompt * self.num_choices + chunk.index
                if chunk.finish_reason is FinishReason.ERROR:
                    raise ApiError(500, chunk.message or "the engine failed on this request")
                choice = self._choices[index]
                pending, num_tokens = choice.take(chunk)
                self.usage.completion_tokens += num_tokens
                timing = self._timings[prompt]
                if chunk.queue_seconds is not None and chunk.index == 0:
                    timing.scheduled(chunk.queue_seconds)
                if num_tokens:
                    timing.took(chunk.index, num_tokens, now())
                if chunk.num_cached_tokens is not None and chunk.index == 0:
                    self.usage.cached_tokens += chunk.num_cached_tokens
                    self._num_cached[prompt] = chunk.num_cached_tokens
                if pending.finish_reason is not None:
                    self.live.discard(index)
                    timing.ended(chunk.index, self._num_cached[prompt])
                    if chunk.finish_reason is None:
                        self._generations[prompt].stop(chunk.index)
                        self._slot.add("stop_strings")
                piece = choice.release()
                if piece is not None:
                    yield piece
        finally:
            self.close()

    async def whole(self) -> list[Piece]:
        """Wait for everything; one piece per choice, in order."""
        choices = [Piece(index) for index in range(len(self._choices))]
        async for piece in self.pieces():
            choices[piece.index].extend(piece)
        return choices

    def close(self) -> None:
        """Abort what has not ended."""
        if self._timer is not None:
            self._timer.cancel()
        for generation in self._generations:
            generation.close()

    def _expire(self) -> None:
        error = ApiError(
            408,
            "the answer was not complete within the x-request-timeout that was asked for",
            "x-request-timeout",
            headers={"x-should-retry": "false"},  # OpenAI's clients would ask again
        )
        for generation in self._generations:
            generation.fail(error)


def _max_queued_tokens(inputs: Sequence[EngineInput]) -> int:
    """How many tokens of a choice may wait to be read, so that a request's memory is bounded."""
    params = inputs[0].params
    entries_per_step = len(inputs) * params.n * (1 + max(0, params.logprobs or 0))
    return max(256, min(MAX_QUEUED_TOKENS, MAX_QUEUED_ENTRIES // entries_per_step))


async def _merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Chunk]]:
    """The chunks of all generations as they come, with the generation's index."""
    if len(generations) == 1:
        async for chunk in generations[0]:
            yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(maxsize=1)

    async def forward(index: int, generation: Generation) -> None:
        end: Exception | None = None
        try:
            async for chunk in generation:
                await queue.put((index, chunk))
        except Exception as error:
            end = error
        await queue.put((index, end))

    tasks = [asyncio.create_task(forward(i, g)) for i, g in enumerate(generations)]
    num_open = len(tasks)
    try:
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Chunk):
                yield index, item
            elif item is None:
                num_open -= 1
            else:
                raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
