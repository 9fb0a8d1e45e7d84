"""The offline Python API: a model in this process, prompts in, text out."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pagedcore.config import DEFAULT_MODEL, EngineConfig
from pagedcore.engine.build import build_engine
from pagedcore.engine.embeddings import EmbeddingOutput, VectorJob
from pagedcore.engine.engine import Engine
from pagedcore.engine.outputs import Choice, CompletionOutput, Job, RequestOutput
from pagedcore.engine.prompts import Message, Params, Prompt, as_prompts, for_each, is_conversation
from pagedcore.errors import EngineDeadError, RequestError
from pagedcore.plugins import collect, load_plugins
from pagedcore.pooling import PoolingKind, PoolingParams
from pagedcore.request import (
    FinishReason,
    OutputKind,
    Request,
    SamplingLimits,
    SamplingParams,
)
from pagedcore.sources import find_model
from pagedcore.step import Finished
from pagedcore.text.inputs import EngineInput, InputProcessor, PooledInput
from pagedcore.text.tokenizer import Tokenizer

__all__ = ["LLM", "CompletionOutput", "EmbeddingOutput", "Message", "Prompt", "RequestOutput"]


class LLM:
    """A model in this process.

        llm = LLM("smollm2-135m", max_num_seqs=8)
        llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text

    Keywords are the fields of `EngineConfig`'s sections and of `SamplingLimits`. Raises
    ConfigError, ModelError, PluginError or UnknownNameError when it cannot start. Streams and
    batches may be under way at the same time, in one thread: it is not thread-safe.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        names = {declared.name for declared in fields(SamplingLimits)}
        self._limits = SamplingLimits(**{k: options.pop(k) for k in names & options.keys()})
        config = EngineConfig.from_options(model=model, **options)
        plugins = load_plugins(config.execution.disable_plugin, config.execution.only_plugin)
        find = partial(find_model, sources=collect(plugins, "pagedcore_sources"))
        folder = find(config.model.model, revision=config.model.revision)
        of_text = folder
        if config.model.tokenizer is not None:
            of_text = find(config.model.tokenizer, holding="tokenizer.json")
        self.tokenizer = Tokenizer.from_folder(of_text)
        read_inputs = partial(
            InputProcessor.from_folder,
            folder,
            self.tokenizer,
            generation_config=config.model.generation_config,
            chat_template=config.model.chat_template,
        )
        read_inputs(max_model_len=1, vocab_size=1)  # complains before any weight is read
        self._engine = build_engine(config, usage="offline", plugins=plugins, folder=folder)
        info = self._engine.info
        self._inputs = read_inputs(max_model_len=info.max_model_len, vocab_size=info.vocab_size)
        self._ids = itertools.count()
        self._live: dict[int, Choice] = {}
        self._vectors: dict[int, VectorJob] = {}
        self._closed = False

    @property
    def engine(self) -> Engine:
        """The engine itself, for programs that drive the steps.

        A step hands its tokens to whoever calls it, so do not mix this with the methods here
        while requests are under way.
        """
        return self._engine

    def default_params(self, **explicit: Any) -> SamplingParams:
        """The model's own sampling parameters, with `explicit` ones over them (SAMPLE-2)."""
        defaults = self._inputs.default_params()
        if self._inputs.default_max_tokens is not None:
            defaults["max_tokens"] = self._inputs.default_max_tokens
        return SamplingParams(**{**defaults, **explicit})

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        progress: bool = True,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; results are in the order of the prompts.

        A prompt is text or token ids. `params` is one for all or one for each prompt. Raises
        RequestError, before anything runs, when any of them is invalid. `progress` shows a bar on
        stderr, where that is a terminal. `adapter` is the name of one that is loaded.
        """
        self._check_open()
        listed = as_prompts(prompts)
        pairs = zip(listed, for_each(params, len(listed)), strict=True)
        entries = [self._completion(prompt, one) for prompt, one in pairs]
        return self._run_all(entries, progress, adapter)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        progress: bool = True,
        adapter: str | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; `adapter` is as in `generate`.

        `template_options` go to the chat template (`tools`, `add_generation_prompt`, ...).
        """
        self._check_open()
        if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
            kind = type(messages).__name__
            raise RequestError(f"messages must be a list of messages, not {kind}", "messages")
        talks: list[Any] = [messages] if is_conversation(messages) else list(messages)
        pairs = zip(talks, for_each(params, len(talks)), strict=True)
        entries = [self._conversation(talk, one, template_options) for talk, one in pairs]
        return self._run_all(entries, progress, adapter)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **template_options: Any,
    ) -> Iterator[RequestOutput]:
        """Yield the growing answer to one prompt or conversation after each step.

        `params.output_kind` decides whether an item holds all text so far, only what is new, or
        whether there is one item at the end. Raises RequestError here and now when the request is
        invalid; it starts with the first item. Leaving the loop aborts it.
        """
        self._check_open()
        [one] = for_each(params, 1)
        if is_conversation(prompt):
            return self._stream(self._conversation(prompt, one, template_options), adapter)
        if template_options:
            names = ", ".join(template_options)
            raise RequestError(f"{names}: only a conversation has a chat template", "prompt")
        as_prompts(prompt)  # complains of what is none
        return self._stream(self._completion(prompt, one), adapter)  # type: ignore[arg-type]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: PoolingParams | PoolingKind | None = None,
        *,
        progress: bool = True,
    ) -> list[EmbeddingOutput]:
        """Turn each prompt into a vector; results are in the order of the prompts.

        `pooling` says how, if only by its name, such as "mean"; None is the model's own way. Any
        model can do it. Raises RequestError, before anything runs, for a prompt that is longer than
        the model's length, and for what the model cannot do.
        """
        self._check_open()
        if not isinstance(pooling, PoolingParams):
            pooling = PoolingParams(pooling=pooling)
        pooling = pooling.settled(self._engine.info.pooling)
        entries = [self._inputs.pooled(prompt, param="prompt") for prompt in as_prompts(prompts)]
        jobs: list[VectorJob] = []
        try:
            for entry in entries:
                self._start_pooled(entry, pooling, jobs)
            self._wait(jobs, progress)
        finally:
            self._abort_ids(job.id for job in jobs)
        return [job.output for job in jobs]

    def load_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Load an adapter (LoRA) as PEFT saves it, for `generate(..., adapter=name)`.

        Raises RequestError for what is no adapter of this model, and without `enable_lora`.
        """
        self._check_open()
        self._engine.adapters.load(name, os.fspath(folder), is_trusted=True)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; raises MissingError for an unknown name."""
        self._check_open()
        self._engine.adapters.unload(name)

    def close(self) -> None:
        """Release the device; the object cannot be used afterwards. Again, it does nothing."""
        if not self._closed:
            self._closed = True
            self._live.clear()
            self._vectors.clear()
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

    def _check_open(self) -> None:
        if self._closed:
            raise EngineDeadError("this LLM was closed: make another one")

    def _completion(self, prompt: Prompt, params: SamplingParams | None) -> EngineInput:
        return self._checked(self._inputs.completion(prompt, params))

    def _conversation(
        self, messages: Any, params: SamplingParams | None, options: Mapping[str, Any]
    ) -> EngineInput:
        return self._checked(self._inputs.chat(messages, params, **options))

    def _checked(self, entry: EngineInput) -> EngineInput:
        task = self._engine.info.task
        if task != "generate":
            raise RequestError(f"this model cannot generate text: it was made to {task}")
        entry.params.check_limits(self._limits)
        return entry

    def _run_all(
        self, entries: Sequence[EngineInput], progress: bool, adapter: str | None
    ) -> list[RequestOutput]:
        jobs: list[Job] = []
        try:
            for entry in entries:
                self._start(entry, jobs, adapter)
            self._wait(jobs, progress)
        finally:
            self._abort(jobs)
        return [job.output for job in jobs]

    def _wait(self, jobs: Sequence[Job] | Sequence[VectorJob], progress: bool) -> None:
        """Run steps until all jobs have ended."""
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        shown = progress and console.is_terminal
        bar = Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not shown
        )
        with bar:
            task = bar.add_task("prompts", total=len(jobs))
            num_done = 0
            while num_done < len(jobs):
                if self._advance():
                    num_done = sum(job.num_live == 0 for job in jobs)
                    bar.update(task, completed=num_done)

    def _stream(self, entry: EngineInput, adapter: str | None) -> Iterator[RequestOutput]:
        self._check_open()
        jobs: list[Job] = []
        kind = entry.params.output_kind
        try:
            self._start(entry, jobs, adapter)
            [job] = jobs
            while job.num_live or job.has_news:
                if job.has_news and (kind is not OutputKind.FINAL_ONLY or not job.num_live):
                    yield job.snapshot(delta=kind is OutputKind.DELTA)
                else:
                    self._check_open()
                    self._advance()
        finally:
            self._abort(jobs)

    def _start(self, entry: EngineInput, jobs: list[Job], adapter: str | None) -> None:
        """Hand one prompt with its n choices to the engine, and add its job to `jobs`."""
        first_id = next(self._ids)
        for _ in range(entry.params.n - 1):
            next(self._ids)
        job = Job(entry, self.tokenizer, first_id)
        requests = [
            Request(
                id=choice.id,
                prompt_token_ids=np.asarray(entry.prompt_token_ids, np.int32),
                params=entry.params.for_choice(index),
                eos_token_id=entry.eos_token_id,
                bad_words_token_ids=entry.bad_words_token_ids,
                adapter=adapter,
            )
            for index, choice in enumerate(job.choices)
        ]
        self._engine.add(requests[0], requests[1:])
        self._live.update((choice.id, choice) for choice in job.choices)
        jobs.append(job)

    def _start_pooled(
        self, entry: PooledInput, pooling: PoolingParams, jobs: list[VectorJob]
    ) -> None:
        job = VectorJob(entry, next(self._ids))
        request = Request(
            id=job.id,
            prompt_token_ids=np.asarray(entry.prompt_token_ids, np.int32),
            params=SamplingParams(max_tokens=1),
            pooling=pooling,
        )
        self._engine.add(request)
        self._vectors[job.id] = job
        jobs.append(job)

    def _abort(self, jobs: Iterable[Job]) -> None:
        """Give up what is left of jobs."""
        self._abort_ids(choice.id for job in jobs for choice in job.choices)

    def _abort_ids(self, request_ids: Iterable[int]) -> None:
        """Give up what is left of requests."""
        ids = [i for i in request_ids if i in self._live or i in self._vectors]
        for request_id in ids:
            self._live.pop(request_id, None)
            self._vectors.pop(request_id, None)
        if ids:
            self._engine.abort(ids)

    def _advance(self) -> bool:
        """Run one step for all jobs under way; whether any choice ended."""
        output = self._engine.step()
        live, vectors = self._live, self._vectors
        num_live = len(live) + len(vectors)
        if output is None:
            return False if self._engine.has_work else self._end_lost()
        searched: list[Choice] = []
        for request_id, token in zip(
            output.request_ids.tolist(), output.tokens.tolist(), strict=True
        ):
            choice = live.get(request_id)
            if choice is not None:
                choice.new_tokens.append(token)
                if choice.has_stop_strings:
                    searched.append(choice)
        for request_id, logprobs in output.logprobs.items():
            if request_id in live:
                live[request_id].new_logprobs.append(logprobs)
        for request_id, entries in output.prompt_logprobs.items():
            if request_id in live:
                live[request_id].job.add_prompt_logprobs(entries)
        for request_id, num_cached in output.num_cached_tokens.items():
            if request_id in live and live[request_id].output.index == 0:
                live[request_id].job.output.num_cached_tokens = num_cached
            elif request_id in vectors:
                vectors[request_id].output.num_cached_tokens = num_cached
        for request_id, vector in output.vectors.items():
            if request_id in vectors:
                vectors[request_id].output.vector = vector
        for end in output.finished:
            if end.request_id in live:
                live.pop(end.request_id).settle(end)
            elif end.request_id in vectors:
                vectors.pop(end.request_id).settle(end)
        for choice in searched:
            if choice.id in live and choice.settle():
                del live[choice.id]
                self._engine.abort([choice.id])  # it knows no stop strings
        return len(live) + len(vectors) < num_live

    def _end_lost(self) -> bool:
        """End what the engine has nothing of: it was aborted there, by its id."""
        lost: list[Choice | VectorJob] = [*self._live.values(), *self._vectors.values()]
        self._live.clear()
        self._vectors.clear()
        for one in lost:
            one.settle(Finished(one.id, FinishReason.ABORT))
        return bool(lost)
