"""The choices of one request, from admission to their last piece."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from pagedcore.engine.client import EngineClient
from pagedcore.engine.generation import Chunk, Generation
from pagedcore.request import FinishReason
from pagedcore.text.inputs import EngineInput
from pagedcore.text.tokenizer import Tokenizer
from pagedcore_openai.counters import Slot
from pagedcore_openai.errors import ApiError
from pagedcore_openai.pieces import Piece, Usage
from pagedcore_openai.prompt_answer import PromptAnswer

__all__ = ["Answer", "Piece", "Usage"]

MAX_QUEUED_TOKENS = 4096
"""How far behind the reader of one choice may fall (STREAM-10)."""

MAX_QUEUED_ENTRIES = 1 << 18
"""The same for a whole request, where each log-probability counts as much as a token."""


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
        owner: str = "",
        adapter: str | None = None,
        interval: int = 1,
        every_token: bool = False,
        deadline: float | None = None,
        arrival: float,
        slot: Slot,
        on_overflow: Callable[[], None] | None = None,
    ) -> None:
        """Prepare; nothing is sent before `admitted`.

        :param owner: see `EngineClient.generate`, as for `adapter`.
        :param interval: tokens that a piece waits for, after the first token (STREAM-4).
        :param every_token: whether tokens make a piece before they have made text.
        :param deadline: when everything must be there, in the event loop's time; else ApiError 408.
        :param arrival: when the request came, in the same time.
        :param slot: what counts and times are told to.
        :param on_overflow: called when nobody reads and the request was aborted (STREAM-10).
        """
        self.num_choices = inputs[0].params.n
        self.usage = Usage(prompt_tokens=sum(len(i.prompt_token_ids) for i in inputs))
        self.live: set[int] = set(range(len(inputs) * self.num_choices))
        """Choices that have not ended."""
        self.finish_reasons: dict[int, FinishReason] = {}
        """How those that have ended did."""
        self.is_admitted = False
        """Whether the engine has taken all prompts."""
        self.failure: Exception | None = None
        """What ended an admitted answer early, if that was not its reader."""
        self.params = inputs[0].params
        self._deadline = deadline
        self._timer: asyncio.TimerHandle | None = None
        self._prompts = [
            PromptAnswer(
                client.generate(
                    item.prompt_token_ids,
                    item.params,
                    eos_token_id=item.eos_token_id,
                    bad_words_token_ids=item.bad_words_token_ids,
                    priority=priority,
                    cache_salt=cache_salt,
                    owner=owner,
                    adapter=adapter,
                    on_overflow=on_overflow,
                ),
                item,
                tokenizer,
                first_index=prompt * self.num_choices,
                interval=interval,
                every_token=every_token,
                arrival=arrival,
                slot=slot,
                usage=self.usage,
            )
            for prompt, item in enumerate(inputs)
        ]
        self.timings = [prompt.timing for prompt in self._prompts]
        """When the tokens of each prompt came."""
        self._generations = [prompt.generation for prompt in self._prompts]
        for generation in self._generations:
            generation.max_queued_tokens = _max_queued_tokens(inputs)

    async def admitted(self) -> None:
        """Wait until the engine has taken all prompts; raises what it refuses one with."""
        if self._deadline is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._deadline, self._expire)
        for prompt in self._prompts:
            prompt.timing.sent()
        try:
            if len(self._generations) == 1:
                await self._generations[0].admitted()
            else:
                await asyncio.gather(*(one.admitted() for one in self._generations))
        except BaseException:
            self.close()
            raise
        self.is_admitted = True

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what is new until all choices have ended.

        Raises ApiError 500 where a choice failed, which ends the others, and what the engine
        raises.
        """
        try:
            async for prompt, chunk in _merged(self._generations):
                for piece in self._prompts[prompt].take(chunk):
                    if piece.finish_reason is not None:
                        self.live.discard(piece.index)
                        self.finish_reasons[piece.index] = piece.finish_reason
                    yield piece
        except Exception as error:
            self.failure = error
            raise
        finally:
            self.close()

    async def whole(self) -> list[Piece]:
        """Wait for everything; one piece per choice, in order."""
        choices = [Piece(index) for index in range(len(self._prompts) * self.num_choices)]
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
