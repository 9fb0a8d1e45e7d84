"""The text of one choice: tokens in, deltas out, ended by stop strings (semantics 4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

from pagedcore.request import FinishReason, SamplingParams
from pagedcore.text.detokenizer import Detokenizer
from pagedcore.text.stop import StopStrings
from pagedcore.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some tokens added."""

    text: str
    """New text; may be empty."""

    num_tokens: int
    """How many of the pushed tokens count: those up to the one that completed a stop string."""

    stop: str | None
    """The stop string that ended the text, before any reason the engine has (STOP-7)."""


class OutputText:
    """Turns a choice's tokens into text, however they are chunked."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        eos_token_id: int,
    ) -> None:
        self._detokenizer: Detokenizer | None = None
        self._stops: StopStrings | None = None
        if params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer,
                prompt_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        if params.stop:
            self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._hidden_ids: frozenset[int] = frozenset()
        if not params.include_stop_str_in_output:
            self._hidden_ids = frozenset((eos_token_id, *params.stop_token_ids))

    def push(
        self, token_ids: Sequence[int], *, finish_reason: FinishReason | None = None
    ) -> TextDelta:
        """Take the next tokens, with the engine's reason when they are the last ones.

        With a reason, all that was held back comes out, and the token that made the engine stop
        adds no text of its own unless it is to be included (DETOK-7). Nothing may be pushed after
        a reason or after a delta with `stop`.
        """
        if self._detokenizer is None:
            return TextDelta("", len(token_ids), None)
        parts: list[str] = []
        body = token_ids if finish_reason is None else token_ids[:-1]
        if self._stops is None:
            parts.append(self._detokenizer.steps(body))
            self._num_tokens += len(body)
            body = []
        for count, token in enumerate(body, 1):
            self._num_tokens += 1
            stop = self._take(self._detokenizer.step(token), parts)
            if stop is not None:
                return TextDelta("".join(parts), count, stop)
        stop = None
        if finish_reason is not None:
            self._num_tokens += len(token_ids) - len(body)
            stop = self._take(self._end(self._detokenizer, token_ids, finish_reason), parts)
            if stop is None and self._stops is not None:
                parts.append(self._stops.flush())
        return TextDelta("".join(parts), len(token_ids), stop)

    @property
    def _may_match(self) -> bool:
        return self._num_tokens > self._min_tokens

    def _take(self, piece: str, parts: list[str]) -> str | None:
        """Pass a piece through the stop strings; the one that matches."""
        if self._stops is None:
            parts.append(piece)
            return None
        text, stop = self._stops.push(piece, may_match=self._may_match)
        parts.append(text)
        return stop

    def _end(self, detokenizer: Detokenizer, token_ids: Sequence[int], reason: FinishReason) -> str:
        """What the last token, if there is one, and the end of the text add."""
        before = detokenizer.pending()
        if not token_ids:
            return before
        piece = detokenizer.step(token_ids[-1]) + detokenizer.pending()
        if reason is not FinishReason.STOP or token_ids[-1] not in self._hidden_ids:
            return piece
        # A stop string that the hidden token completes wins over it (STOP-7).
        completed = self._may_match and self._stops is not None and self._stops.find(piece)
        return piece if completed else before
