"""The choices of one prompt: chunks of the engine in, pieces out."""

from collections.abc import Iterator

from pagedcore.engine.generation import Chunk, Generation
from pagedcore.request import FinishReason
from pagedcore.step import TokenLogprobs
from pagedcore.text.inputs import EngineInput
from pagedcore.text.output_text import OutputText
from pagedcore.text.tokenizer import Tokenizer
from pagedcore_openai.counters import Slot
from pagedcore_openai.errors import ApiError
from pagedcore_openai.pieces import Choice, Piece, Usage
from pagedcore_openai.timing import RequestTiming, now


class PromptAnswer:
    """Takes what one generation yields."""

    def __init__(
        self,
        generation: Generation,
        item: EngineInput,
        tokenizer: Tokenizer,
        *,
        first_index: int,
        interval: int,
        every_token: bool,
        arrival: float,
        slot: Slot,
        usage: Usage,
    ) -> None:
        """`first_index` is that of its first choice; `usage` is the whole request's."""
        self.generation = generation
        self.timing = RequestTiming(slot, item.params, len(item.prompt_token_ids), arrival)
        self._first_index = first_index
        self._slot = slot
        self._usage = usage
        self._num_cached = 0
        self._choices = [
            Choice(
                first_index + index,
                OutputText(
                    tokenizer, item.prompt_token_ids, item.params, eos_token_id=item.eos_token_id
                ),
                interval,
                every_token,
            )
            for index in range(item.params.n)
        ]
        # An engine scores a prompt once, for its first choice; the others wait for the scores.
        self._num_scores = 0
        if item.params.prompt_logprobs is not None:
            self._num_scores = len(item.prompt_token_ids) - 1
        self._scores: list[TokenLogprobs] = []
        self._held: list[Chunk] = []

    def take(self, chunk: Chunk) -> Iterator[Piece]:
        """What may be sent once `chunk` has come; raises ApiError 500 for a choice that failed."""
        if chunk.finish_reason is FinishReason.ERROR:
            raise ApiError(500, chunk.message or "the engine failed on this request")
        if chunk.index == 0:
            self._take_once(chunk)
        elif len(self._scores) < self._num_scores:
            self._held.append(chunk)
            return
        piece = self._take(chunk)
        if piece is not None:
            yield piece
        if len(self._scores) >= self._num_scores:
            held, self._held = self._held, []
            for waiting in held:
                piece = self._take(waiting)
                if piece is not None:
                    yield piece

    def _take_once(self, chunk: Chunk) -> None:
        """What the first choice tells of the prompt."""
        if chunk.queue_seconds is not None:
            self.timing.scheduled(chunk.queue_seconds)
        if chunk.num_cached_tokens is not None:
            self._num_cached = chunk.num_cached_tokens
            self._usage.cached_tokens += chunk.num_cached_tokens
        self._scores += chunk.prompt_logprobs or ()

    def _take(self, chunk: Chunk) -> Piece | None:
        choice = self._choices[chunk.index]
        pending, num_tokens = choice.take(chunk)
        self._usage.completion_tokens += num_tokens
        if num_tokens:
            self.timing.took(chunk.index, num_tokens, now())
        if pending.finish_reason is not None:
            self.timing.ended(chunk.index, self._num_cached)
            if chunk.finish_reason is None:
                self.generation.stop(chunk.index)
                self._slot.add("stop_strings")
        piece = choice.release()
        if piece is not None and piece.first and chunk.index != 0:
            piece.prompt_logprobs = list(self._scores)
        return piece
