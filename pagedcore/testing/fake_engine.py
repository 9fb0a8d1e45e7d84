"""An engine without a model: the interface of `pagedcore.engine.engine.Engine`, tokens by rule.

It needs no torch and takes no time, so that a server, a client or an HTTP surface can be tested
with thousands of requests. What it produces depends on the request alone, never on the batch.
"""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pagedcore.config import EngineConfig, Usage
from pagedcore.engine.adapters import Adapters
from pagedcore.engine.info import EngineInfo
from pagedcore.errors import ConfigError, OverloadedError, RequestError
from pagedcore.pooling import PoolingInfo, PoolingParams, Task
from pagedcore.request import FinishReason, Request, SamplingParams
from pagedcore.step import Finished, StepOutput, TokenLogprobs

_PAUSED_STEP_S = 0.001

VECTOR_SIZE = 8
"""Elements of a fake engine's vectors."""

Reply = Callable[[Request], Iterable[int]]
"""Gives the tokens of a request; where they end, so does the sequence, with `stop`."""


def echo(request: Request) -> Iterator[int]:
    """Repeat the prompt for ever, beginning at token `seed` of it (choice k has seed + k)."""
    tokens = request.prompt_token_ids.tolist()
    start = (request.params.seed or 0) % len(tokens)
    return itertools.islice(itertools.cycle(tokens), start, None)


def fake_vector(prompt: Sequence[int], params: PoolingParams) -> NDArray[np.float32]:
    """How often each remainder of division by VECTOR_SIZE is among the tokens; what `scores` are is
    the share of distinct tokens. `params` are settled.
    """
    tokens = np.asarray(prompt, np.int64)
    if params.pooling == "scores":
        return np.array([len(set(tokens.tolist())) / len(tokens)], np.float32)
    counts = np.bincount(tokens % VECTOR_SIZE, minlength=VECTOR_SIZE)
    vector: NDArray[np.float32] = counts.astype(np.float32)[: params.dimensions]
    if params.normalize:
        vector /= np.float32(max(float(np.linalg.norm(vector)), 1.0))
    return vector


def build_fake_engine(config: EngineConfig, *, usage: Usage) -> "FakeEngine":
    """A FakeEngine for a child process: `EngineProcess(config, build=BUILD_FAKE)`.

    It takes what it can from the configuration; raises ConfigError for the device "none".
    """
    if config.execution.device == "none":
        raise ConfigError("the device 'none' cannot run anything: choose another")
    return FakeEngine(
        model=config.model.model,
        served_model_names=config.model.served_model_name or (config.model.model,),
        max_model_len=config.model.max_model_len or 4096,
        max_num_seqs=config.scheduler.max_num_seqs or (64 if usage == "offline" else 256),
        max_num_queued_reqs=config.scheduler.max_num_queued_reqs,
        task=_task_of(Path(config.model.model)),
    )


def _task_of(folder: Path) -> Task:
    """What the model in a folder claims to be made for, in the field `fake_task` of config.json."""
    path = folder / "config.json"
    task: Task = "generate"
    if path.is_file():
        task = json.loads(path.read_text()).get("fake_task", task)
    return task


BUILD_FAKE = "pagedcore.testing.fake_engine:build_fake_engine"


@dataclass(slots=True, eq=False)
class _Sequence:
    request: Request
    tokens: Iterator[int]
    is_child: bool
    produced: list[int] = field(default_factory=list)


class FakeEngine:
    """One token per step for each running sequence, from `reply`.

    Prompt and output lengths, end-of-sequence and stop token ids, log-probabilities, the queue's
    limit and cached prefixes behave as a real engine's. Other threads may look on, and use `hold`,
    `pause`, `advance`, `release`, `fail_running`, `break_down` and `wait_for`; the rest is for the
    one that steps.
    """

    def __init__(
        self,
        reply: Reply = echo,
        *,
        model: str = "fake",
        served_model_names: Sequence[str] = ("fake",),
        max_model_len: int = 4096,
        vocab_size: int = 512,
        max_num_seqs: int = 64,
        max_num_queued_reqs: int = 8192,
        task: Task = "generate",
        adapters: Adapters | None = None,
    ) -> None:
        """Make an engine that has nothing to do.

        :param reply: what to answer; see `echo`.
        :param model: folder that surfaces may take a tokenizer from.
        :param max_num_queued_reqs: sequences that may wait before OverloadedError.
        """
        self.adapters = adapters or Adapters()
        self.info = EngineInfo(
            model=model,
            served_model_names=tuple(served_model_names),
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            block_size=16,
            num_blocks=1 + max_num_seqs * -(-max_model_len // 16),
            max_num_seqs=max_num_seqs,
            task=task,
            enable_lora=adapters is not None,
            pooling=PoolingInfo(
                size=VECTOR_SIZE, is_matryoshka=True, num_labels=1 if task == "classify" else 0
            ),
        )
        self.aborted: list[int] = []
        """Ids of sequences that were aborted before their end, in order."""
        self.num_added = 0
        """Sequences that were taken."""
        self.num_steps = 0
        """Steps that were run."""
        self._reply = reply
        self._max_num_queued_reqs = max_num_queued_reqs
        self._waiting: dict[int, _Sequence] = {}
        self._running: dict[int, _Sequence] = {}
        self._num_ended: Counter[FinishReason] = Counter()
        self._seen_prompts: set[bytes] = set()
        self._held = False
        self._paused = False
        self._steps_until_pause: int | None = None
        self._failure: Exception | None = None
        self._sequence_failure: str | None = None
        self._changed = threading.Condition(threading.RLock())

    # What an engine does:

    @property
    def has_work(self) -> bool:
        """Whether `step()` has something to do."""
        return bool(self._running or self._waiting or self._failure)

    def add(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queue a request and its other choices; raises RequestError or OverloadedError."""
        family = (request, *forks)
        length = len(request.prompt_token_ids)
        most = self.info.max_model_len - (request.pooling is None)
        if length > most:
            raise RequestError(
                f"the prompt has {length} tokens; at most {most} fit",
                "prompt",
            )
        for member in family:
            self.adapters.settle(member)
        with self._changed:
            if len(self._waiting) + len(family) > self._max_num_queued_reqs:
                raise OverloadedError("the queue is full", "queued_reqs")
            for member in family:
                if member.id in self._waiting or member.id in self._running:
                    raise ValueError(f"request id {member.id} is in use")
                self._waiting[member.id] = _Sequence(
                    member, iter(self._reply(member)), is_child=member is not request
                )
            self.num_added += len(family)
            self._changed.notify_all()

    def abort(self, request_ids: Iterable[int]) -> None:
        """End sequences without another word; unknown ids are ignored."""
        with self._changed:
            for request_id in request_ids:
                for state in (self._waiting, self._running):
                    if state.pop(request_id, None) is not None:
                        self.aborted.append(request_id)
                        self._num_ended[FinishReason.ABORT] += 1
            self._changed.notify_all()

    def reset_prefix_cache(self) -> bool:
        """Forget prompts seen before; False, changing nothing, while there is work."""
        if self.has_work:
            return False
        self._seen_prompts.clear()
        return True

    def step(self) -> StepOutput | None:
        """Give each running sequence its next token; blocks while the engine is held."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held)
            if self._paused and self._failure is None:
                self._changed.wait(_PAUSED_STEP_S)
                return None
            if self._failure is not None:
                raise self._failure
            output = self._fail_step() if self._sequence_failure else self._token_step()
            self.num_steps += 1
            if self._steps_until_pause is not None:
                self._steps_until_pause -= 1
                if self._steps_until_pause == 0:
                    self._paused, self._steps_until_pause = True, None
            self._changed.notify_all()
            return output

    def prepare(self) -> bool:
        """Nothing to prepare."""
        return False

    def stats(self) -> dict[str, float]:
        """Counters and gauges by name."""
        return {
            "num_requests_running": len(self._running),
            "num_requests_waiting": len(self._waiting),
            "num_steps": self.num_steps,
            **{f"request_success_{reason}": n for reason, n in self._num_ended.items()},
        }

    def shutdown(self) -> None:
        """Drop everything."""
        self.abort([*self._waiting, *self._running])

    # What a test does to it:

    @property
    def live_ids(self) -> list[int]:
        """Ids that wait or run."""
        with self._changed:
            return [*self._running, *self._waiting]

    def hold(self) -> None:
        """Let the next step block, as a stuck device would, until `release`."""
        with self._changed:
            self._held = True

    def pause(self) -> None:
        """Let steps produce nothing until `release`; between them, requests come and go."""
        with self._changed:
            self._paused = True

    def advance(self, num_steps: int, timeout_s: float = 30.0) -> None:
        """Let exactly so many steps with work happen, wait for them, and be paused then.

        Raises TimeoutError where there is not enough to do.
        """
        with self._changed:
            self._held = self._paused = False
            self._steps_until_pause = num_steps
            self._changed.notify_all()
            self.wait_for(lambda _: self._paused, timeout_s)

    def release(self) -> None:
        """Let steps go on."""
        with self._changed:
            self._held = self._paused = False
            self._steps_until_pause = None
            self._changed.notify_all()

    def fail_running(self, message: str) -> None:
        """Let everything that takes part in the next step end with an error."""
        with self._changed:
            self._sequence_failure = message

    def break_down(self, error: Exception) -> None:
        """Let every further step raise `error`."""
        with self._changed:
            self._failure = error
            self._held = False
            self._changed.notify_all()

    def wait_for(self, condition: Callable[["FakeEngine"], bool], timeout_s: float = 30.0) -> None:
        """Wait until `condition(self)` holds; raises TimeoutError if it never does."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout_s):
                raise TimeoutError("the engine did not come into the state that was waited for")

    def _admit(self, output: StepOutput) -> None:
        free = self.info.max_num_seqs - len(self._running)
        for request_id in list(itertools.islice(self._waiting, free)):
            sequence = self._running[request_id] = self._waiting.pop(request_id)
            request = sequence.request
            prompt = request.prompt_token_ids
            whole_blocks = (len(prompt) - 1) // self.info.block_size * self.info.block_size
            seen = prompt.tobytes() in self._seen_prompts
            output.num_cached_tokens[request_id] = whole_blocks if seen else 0
            output.queue_seconds[request_id] = max(0.0, time.monotonic() - request.arrival_time)
            self._seen_prompts.add(prompt.tobytes())
            if request.params.prompt_logprobs is not None and not sequence.is_child:
                output.prompt_logprobs[request_id] = [
                    _logprobs(token, request.params.prompt_logprobs, self.info.vocab_size)
                    for token in prompt[1:].tolist()
                ]

    def _token_step(self) -> StepOutput:
        output = _empty_output()
        self._admit(output)
        ids, tokens = [], []
        for request_id, sequence in list(self._running.items()):
            pooling = sequence.request.pooling
            if pooling is not None:
                prompt = sequence.request.prompt_token_ids.tolist()
                output.vectors[request_id] = fake_vector(prompt, pooling)
                output.finished.append(Finished(request_id, FinishReason.STOP))
                self._num_ended[FinishReason.STOP] += 1
                del self._running[request_id]
                continue
            token = next(sequence.tokens, None)
            if token is not None:
                sequence.produced.append(token)
                ids.append(request_id)
                tokens.append(token)
                count = sequence.request.params.logprobs
                if count is not None:
                    output.logprobs[request_id] = _logprobs(token, count, self.info.vocab_size)
            end = self._end_of(sequence, token)
            if end is not None:
                output.finished.append(end)
                self._num_ended[end.reason] += 1
                del self._running[request_id]
        output.request_ids = np.array(ids, np.int64)
        output.tokens = np.array(tokens, np.int32)
        return output

    def _end_of(self, sequence: _Sequence, token: int | None) -> Finished | None:
        request = sequence.request
        if token is None:
            return Finished(request.id, FinishReason.STOP)
        count = len(sequence.produced)
        if count >= request.params.min_tokens:
            if token == request.eos_token_id and not request.params.ignore_eos:
                return Finished(request.id, FinishReason.STOP)
            if token in request.params.stop_token_ids:
                return Finished(request.id, FinishReason.STOP, stop_reason=token)
        if count >= _max_tokens(request.params, self.info, len(request.prompt_token_ids)):
            return Finished(request.id, FinishReason.LENGTH)
        return None

    def _fail_step(self) -> StepOutput:
        output = _empty_output()
        self._admit(output)
        output.finished = [
            Finished(request_id, FinishReason.ERROR, message=self._sequence_failure)
            for request_id in self._running
        ]
        self._running.clear()
        self._sequence_failure = None
        return output


def _empty_output() -> StepOutput:
    return StepOutput(np.empty(0, np.int64), np.empty(0, np.int32))


def _max_tokens(params: SamplingParams, info: EngineInfo, prompt_length: int) -> int:
    room = info.max_model_len - prompt_length
    return room if params.max_tokens is None else min(params.max_tokens, room)


def _logprobs(token: int, count: int, vocab_size: int) -> TokenLogprobs:
    """`token` as the most likely of `count + 1`, each half as likely as the one before."""
    num = min(max(count, 1), vocab_size) if count >= 0 else vocab_size
    ids = (token + np.arange(num)) % vocab_size
    return TokenLogprobs(
        ids.astype(np.int32),
        (-np.log(2.0) * np.arange(1, num + 1)).astype(np.float32),
        np.arange(1, num + 1, dtype=np.int32),
    )
