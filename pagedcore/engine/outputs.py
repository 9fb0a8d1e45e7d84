"""What offline callers get back, and how a request's tokens become it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pagedcore.request import FinishReason
from pagedcore.step import Finished, TokenLogprobs
from pagedcore.text.inputs import EngineInput
from pagedcore.text.output_text import OutputText
from pagedcore.text.tokenizer import Tokenizer


@dataclass(slots=True)
class CompletionOutput:
    """One choice of one prompt, as far as it has come."""

    index: int
    """Which of the n choices."""

    text: str = ""
    """The text; empty with `detokenize=False`."""

    token_ids: list[int] = field(default_factory=list)
    """The tokens behind it."""

    logprobs: list[TokenLogprobs] | None = None
    """One entry per token, when `logprobs` was asked for."""

    finish_reason: FinishReason | None = None
    """None while the choice goes on."""

    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it, where one did."""

    message: str | None = None
    """Why, when `finish_reason` is ERROR."""


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its choices."""

    prompt: str | None
    """The text that was asked for or rendered; None when the prompt was token ids."""

    prompt_token_ids: list[int]
    """What the model saw."""

    outputs: list[CompletionOutput]
    """The n choices, in order."""

    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry per prompt token, the first None, when `prompt_logprobs` was asked for."""

    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason is not None for choice in self.outputs)


class Choice:
    """One choice on its way: gathers tokens, and makes text of them when somebody looks.

    One with stop strings must be looked at after every token, since they may end it.
    """

    __slots__ = ("has_stop_strings", "id", "job", "new_logprobs", "new_tokens", "output", "text")

    def __init__(
        self, job: "Job", request_id: int, output: CompletionOutput, text: OutputText
    ) -> None:
        self.id = request_id
        self.job = job
        self.output = output
        self.text = text
        self.has_stop_strings = bool(job.entry.params.stop)
        self.new_tokens: list[int] = []
        """Produced, and not in `output` yet."""
        self.new_logprobs: list[TokenLogprobs] = []
        """Those of `new_tokens`, when they were asked for."""

    def settle(self, end: Finished | None = None) -> bool:
        """Move the new tokens to the output, as text too; whether a stop string ended the choice.

        `end` is what the engine said with the last of them.
        """
        output, reason = self.output, None if end is None else end.reason
        if not self.new_tokens and reason is None:
            return False
        delta = self.text.push(self.new_tokens, finish_reason=reason)
        output.text += delta.text
        output.token_ids += self.new_tokens[: delta.num_tokens]
        if output.logprobs is not None:
            output.logprobs += self.new_logprobs[: delta.num_tokens]
        self.new_tokens, self.new_logprobs = [], []
        if delta.stop is not None:  # before any reason the engine has (STOP-7)
            output.finish_reason, output.stop_reason = FinishReason.STOP, delta.stop
        elif end is not None:
            output.finish_reason, output.stop_reason = reason, end.stop_reason
            output.message = end.message
        if output.finish_reason is not None:
            self.job.num_live -= 1
        return delta.stop is not None


class Job:
    """One prompt on its way, with its n choices; their request ids count up from `first_id`."""

    def __init__(self, entry: EngineInput, tokenizer: Tokenizer, first_id: int) -> None:
        self.entry = entry
        params = entry.params
        self.choices = [
            Choice(
                self,
                first_id + index,
                CompletionOutput(index, logprobs=None if params.logprobs is None else []),
                OutputText(
                    tokenizer, entry.prompt_token_ids, params, eos_token_id=entry.eos_token_id
                ),
            )
            for index in range(params.n)
        ]
        self.output = RequestOutput(
            prompt=entry.prompt,
            prompt_token_ids=list(entry.prompt_token_ids),
            outputs=[choice.output for choice in self.choices],
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        self.num_live = params.n
        """Choices that have not ended."""
        self._seen = [(0, 0)] * params.n
        self._num_live_seen = params.n
        self._num_prompt_seen = 0

    def add_prompt_logprobs(self, entries: Sequence[TokenLogprobs]) -> None:
        """Take the next piece of the prompt's log-probabilities."""
        if self.output.prompt_logprobs is not None:
            self.output.prompt_logprobs += entries

    @property
    def has_news(self) -> bool:
        """Whether a token came or a choice ended since the last snapshot."""
        if self.num_live != self._num_live_seen:
            return True
        return any(
            choice.new_tokens or len(choice.output.token_ids) > num_tokens
            for choice, (_, num_tokens) in zip(self.choices, self._seen, strict=True)
        )

    def snapshot(self, *, delta: bool) -> RequestOutput:
        """A copy that later steps do not change; with `delta`, only what is new."""
        copies = []
        for choice, (num_chars, num_tokens) in zip(self.choices, self._seen, strict=True):
            choice.settle()
            output, chars, tokens = choice.output, num_chars * delta, num_tokens * delta
            copies.append(
                replace(
                    output,
                    text=output.text[chars:],
                    token_ids=output.token_ids[tokens:],
                    logprobs=None if output.logprobs is None else output.logprobs[tokens:],
                )
            )
        self._seen = [(len(c.output.text), len(c.output.token_ids)) for c in self.choices]
        self._num_live_seen = self.num_live
        of_prompt = self.output.prompt_logprobs
        if of_prompt is not None:
            seen, self._num_prompt_seen = self._num_prompt_seen, len(of_prompt)
            of_prompt = of_prompt[seen * delta :]
        return replace(self.output, outputs=copies, prompt_logprobs=of_prompt)
