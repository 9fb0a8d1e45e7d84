"""What is new of a choice, on its way from tokens to text."""

from dataclasses import dataclass, field

from pagedcore.engine.generation import Chunk
from pagedcore.request import FinishReason
from pagedcore.step import TokenLogprobs
from pagedcore.text.output_text import OutputText


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


class Choice:
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
