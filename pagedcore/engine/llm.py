"""The offline Python API: a model in this process, prompts in, text out."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pagedcore.config import DEFAULT_MODEL, EngineConfig
from pagedcore.engine.build import build_engine
from pagedcore.engine.engine import Engine
from pagedcore.errors import RequestError
from pagedcore.request import FinishReason, OutputKind, Request, SamplingParams
from pagedcore.step import StepOutput, TokenLogprobs
from pagedcore.text.inputs import EngineInput, InputProcessor
from pagedcore.text.output_text import OutputText
from pagedcore.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int]


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


class LLM:
    """A model in this process.

        llm = LLM("smollm2-135m", max_num_seqs=8)
        llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text

    Keywords are the fields of `EngineConfig`'s sections. Raises ConfigError, ModelError,
    PluginError or UnknownNameError when it cannot start. Not thread-safe.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        config = EngineConfig.from_options(model=model, **options)
        self._engine: Engine = build_engine(config, usage="offline")
        info = self._engine.info
        self.tokenizer = Tokenizer.from_folder(Path(config.model.tokenizer or info.model))
        self._inputs = InputProcessor.from_folder(
            Path(info.model),
            self.tokenizer,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            generation_config=config.model.generation_config,
            chat_template=config.model.chat_template,
        )
        self._ids = itertools.count()

    @property
    def engine(self) -> Engine:
        """The engine itself, for programs that drive the steps."""
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt; results are in the order of the prompts.

        A prompt is text or token ids. `params` is one for all or one for each prompt. Raises
        RequestError, before anything runs, when any of them is invalid.
        """
        listed = _as_list(prompts)
        inputs = [
            self._inputs.completion(p, q)
            for p, q in zip(listed, _for_each(params, listed), strict=True)
        ]
        return self._run_all(inputs, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several.

        `template_options` go to the chat template (`tools`, `add_generation_prompt`, ...).
        """
        talks: list[Any] = [messages] if _is_conversation(messages) else list(messages)
        inputs = [
            self._inputs.chat(talk, q, **template_options)
            for talk, q in zip(talks, _for_each(params, talks), strict=True)
        ]
        return self._run_all(inputs, progress)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        **template_options: Any,
    ) -> Iterator[RequestOutput]:
        """Yield the growing answer to one prompt or conversation after each step.

        `params.output_kind` decides whether an item holds all text so far, only what is new, or
        whether there is one item at the end. Leaving the loop aborts the request.
        """
        if _is_conversation(prompt):
            job = self._start(self._inputs.chat(prompt, params, **template_options))  # type: ignore[arg-type]
        else:
            job = self._start(self._inputs.completion(prompt, params))  # type: ignore[arg-type]
        return self._stream(job)

    def close(self) -> None:
        """Release the device; the object cannot be used afterwards."""
        self._engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, entry: EngineInput) -> "_Job":
        """Hand one prompt with its n choices to the engine."""
        job = _Job(entry, self.tokenizer, first_id=next(self._ids))
        requests = [
            Request(
                id=job.first_id + index,
                prompt_token_ids=np.asarray(entry.prompt_token_ids, np.int32),
                params=entry.params.for_choice(index),
                eos_token_id=entry.eos_token_id,
                bad_words_token_ids=entry.bad_words_token_ids,
            )
            for index in range(entry.params.n)
        ]
        for _ in requests[1:]:
            next(self._ids)
        self._engine.add(requests[0], requests[1:])
        return job

    def _run_all(self, inputs: Sequence[EngineInput], progress: bool) -> list[RequestOutput]:
        jobs = [self._start(entry) for entry in inputs]
        by_id = {job.first_id + i: job for job in jobs for i in range(len(job.output.outputs))}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        bar = Progress(*columns, TimeElapsedColumn(), transient=True, disable=not progress)
        try:
            with bar:
                task = bar.add_task("prompts", total=len(jobs))
                while by_id:
                    self._advance(by_id)
                    bar.update(task, completed=sum(job.output.finished for job in jobs))
        finally:
            self._engine.abort(list(by_id))
        return [job.output for job in jobs]

    def _stream(self, job: "_Job") -> Iterator[RequestOutput]:
        by_id = {job.first_id + i: job for i in range(len(job.output.outputs))}
        kind = job.entry.params.output_kind
        try:
            while by_id:
                if not self._advance(by_id):
                    continue
                if kind is not OutputKind.FINAL_ONLY or not by_id:
                    yield job.snapshot(delta=kind is OutputKind.DELTA)
        finally:
            self._engine.abort(list(by_id))

    def _advance(self, by_id: dict[int, "_Job"]) -> bool:
        """Run one step; drop ended choices from `by_id`. Whether any of them moved."""
        output = self._engine.step()
        if output is None:
            return False
        moved = False
        ended = {end.request_id: end for end in output.finished}
        tokens = dict(zip(output.request_ids.tolist(), output.tokens.tolist(), strict=True))
        for request_id in tokens.keys() | ended.keys() | output.prompt_logprobs.keys():
            job = by_id.get(request_id)
            if job is None:
                continue
            moved = True
            end = ended.get(request_id)
            done = job.take(
                request_id,
                [tokens[request_id]] if request_id in tokens else [],
                output,
                end.reason if end else None,
                end.stop_reason if end else None,
            )
            if done:
                del by_id[request_id]
                if end is None:  # a stop string, which the engine does not know
                    self._engine.abort([request_id])
        return moved


class _Job:
    """One prompt on its way: gathers tokens into text."""

    def __init__(self, entry: EngineInput, tokenizer: Tokenizer, first_id: int) -> None:
        self.entry = entry
        self.first_id = first_id
        params = entry.params
        choices = [
            CompletionOutput(index, logprobs=None if params.logprobs is None else [])
            for index in range(params.n)
        ]
        self.output = RequestOutput(
            prompt=entry.prompt,
            prompt_token_ids=list(entry.prompt_token_ids),
            outputs=choices,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        self._texts = [
            OutputText(tokenizer, entry.prompt_token_ids, params, eos_token_id=entry.eos_token_id)
            for _ in choices
        ]
        self._sent = [(0, 0) for _ in choices]

    def take(
        self,
        request_id: int,
        token_ids: list[int],
        step: StepOutput,
        reason: FinishReason | None,
        stop_reason: int | None,
    ) -> bool:
        """Add a step's tokens to a choice; whether the choice is over."""
        index = request_id - self.first_id
        choice = self.output.outputs[index]
        if request_id in step.num_cached_tokens and index == 0:
            self.output.num_cached_tokens = step.num_cached_tokens[request_id]
        if self.output.prompt_logprobs is not None and index == 0:
            self.output.prompt_logprobs += step.prompt_logprobs.get(request_id, [])
        if choice.logprobs is not None and request_id in step.logprobs:
            choice.logprobs.append(step.logprobs[request_id])
        delta = self._texts[index].push(token_ids, finish_reason=reason)
        choice.token_ids += token_ids
        choice.text += delta.text
        if delta.stop is not None:
            choice.finish_reason, choice.stop_reason = FinishReason.STOP, delta.stop
        elif reason is not None:
            choice.finish_reason, choice.stop_reason = reason, stop_reason
        return choice.finish_reason is not None

    def snapshot(self, *, delta: bool) -> RequestOutput:
        """A copy that later steps do not change; with `delta`, only what is new."""
        choices = []
        for i, choice in enumerate(self.output.outputs):
            chars, tokens = self._sent[i] if delta else (0, 0)
            choices.append(
                replace(
                    choice,
                    text=choice.text[chars:],
                    token_ids=choice.token_ids[tokens:],
                    logprobs=None if choice.logprobs is None else choice.logprobs[tokens:],
                )
            )
            self._sent[i] = (len(choice.text), len(choice.token_ids))
        return replace(self.output, outputs=choices)


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and isinstance(value[0], Mapping)
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: Sequence[object]
) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts need as many params, not {len(params)}")
    return params
