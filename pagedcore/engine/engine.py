"""The step loop: plan, launch, and collect what an earlier launch produced.

With `async_scheduling` two steps are in flight: while the device runs one, the next is planned and
launched, and only then are the first one's tokens collected. The tokens are the same either way:
the last token of a sequence goes from step to step on the device, and a step that turns out to have
been one too many for a sequence is dropped (semantics ASYNC-1..7).
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pluggy

from pagedcore.engine.adapters import Adapters
from pagedcore.engine.info import EngineInfo
from pagedcore.engine.observers import Observers, StepStats, record_of
from pagedcore.metrics import STEP_TOKENS, Buckets
from pagedcore.request import Request
from pagedcore.scheduling.scheduler import Scheduler
from pagedcore.step import StepOutput, StepPlan, StepResult

if TYPE_CHECKING:
    from pagedcore.execution.logits_processors import LogitsProcessors

logger = logging.getLogger(__name__)


class PendingStep(Protocol):
    """A step that the device may still be running."""

    def result(self) -> StepResult:
        """Wait for the step; raises what made it fail."""
        ...


class StepExecutor(Protocol):
    """Where steps run. See `pagedcore.execution.executor.Executor`."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step and return at once. Steps run in the order of their launches."""
        ...

    def prepare(self) -> bool:
        """Do a piece of work that later steps profit from; False when none is left."""
        ...

    def shutdown(self) -> None:
        """Wait for steps in flight and give the device's memory back."""
        ...


@dataclass(slots=True)
class _InFlight:
    plan: StepPlan
    pending: PendingStep
    plan_seconds: float


class Engine:
    """Requests in, tokens out, one `step()` at a time, in the caller's thread.

    A plain object: it installs no handler, opens no port and sets no global; several live in one
    process. It is not thread-safe; `EngineServer` gives it to one thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: StepExecutor,
        info: EngineInfo,
        *,
        async_scheduling: bool = True,
        plugins: pluggy.PluginManager | None = None,
        logits_processors: "LogitsProcessors | None" = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.info = info
        self.adapters = adapters or Adapters()
        """What requests may name beside the model."""
        self._scheduler = scheduler
        self._executor = executor
        self._depth = 2 if async_scheduling else 1
        self._in_flight: deque[_InFlight] = deque()
        self._step_tokens = Buckets(STEP_TOKENS)
        self._logits_processors = logits_processors
        self._observers = Observers(plugins)
        self._watches_steps = self._observers.listen_to("pagedcore_step_finished")
        self._watches_requests = self._observers.listen_to("pagedcore_request_finished")
        if self._watches_requests:
            scheduler.keep_ended()

    @property
    def has_work(self) -> bool:
        """Whether `step()` has something to do."""
        return bool(self._in_flight) or self._scheduler.has_work

    def add(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queue a request, and `forks` that share its prompt (the other choices of n > 1).

        All are taken or none. Raises RequestError for a prompt that can never fit, MissingError for
        an unknown adapter, and OverloadedError when the queue is full.
        """
        self._check([request, *forks])
        self._scheduler.add(request, forks)

    def fork(self, request_id: int, children: Sequence[Request]) -> None:
        """Let `children` go on from what a live request has now (semantics FORK-1)."""
        self._check(children)
        self._scheduler.fork(request_id, children)

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests in whatever state they are; unknown ones are ignored (CANCEL-2)."""
        self._scheduler.abort(request_ids)
        if self._watches_requests:
            self._tell_ended()

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False, changing nothing, while blocks are in use (POOL-7)."""
        return self._scheduler.reset_prefix_cache()

    def step(self) -> StepOutput | None:
        """Launch the next step, and return what the oldest one in flight produced.

        None when nothing has finished: the pipeline is filling, or there is nothing to do.
        """
        launched = self._launch_next()
        if not self._in_flight or (launched and len(self._in_flight) < self._depth):
            return None
        return self._collect_oldest()

    def prepare(self) -> bool:
        """While there is no work: get ready for more, such as by capturing one more graph.

        Takes a fraction of a second; False when nothing is left to prepare.
        """
        return self._executor.prepare()

    def stats(self) -> dict[str, float]:
        """Counters and gauges by name, for metrics."""
        return {
            **self._scheduler.stats(),
            **self._step_tokens.stats(),
            **self._observers.stats(),
        }

    def shutdown(self) -> None:
        """Drop what is in flight and release the device."""
        self._in_flight.clear()
        self._executor.shutdown()

    def _check(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.adapters.settle(request)
        if self._logits_processors is not None:
            for request in requests:
                self._logits_processors.check(request.params)

    def _launch_next(self) -> bool:
        if self._in_flight and isinstance(self._in_flight[-1].pending, _FailedStep):
            return False  # the device has not seen it, so nothing may build on it
        started = time.perf_counter()
        plan = self._scheduler.plan_step()
        if plan is None:
            return False
        self._step_tokens.observe(plan.num_tokens)
        pending: PendingStep
        try:
            pending = self._executor.launch(plan)
        except Exception as error:
            logger.exception("a step could not be launched")
            pending = _FailedStep(error)
        self._in_flight.append(_InFlight(plan, pending, time.perf_counter() - started))
        return True

    def _collect_oldest(self) -> StepOutput:
        step = self._in_flight.popleft()
        started = time.perf_counter()
        try:
            result = step.pending.result()
        except Exception as error:
            logger.exception("a step failed")
            arrived = time.perf_counter()
            output = self._scheduler.fail_step(step.plan, f"{type(error).__name__}: {error}")
        else:
            arrived = time.perf_counter()
            output = self._scheduler.finish_step(step.plan, result)
        if self._watches_steps:
            self._tell_step(step, output, arrived - started, time.perf_counter() - arrived)
        if self._watches_requests:
            self._tell_ended()
        return output

    def _tell_step(
        self, step: _InFlight, output: StepOutput, wait_seconds: float, finish_seconds: float
    ) -> None:
        stats = StepStats(
            num_seqs=len(step.plan.rows),
            num_tokens=step.plan.num_tokens,
            num_outputs=len(output.tokens),
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            cache_usage=self._scheduler.cache_usage,
            plan_seconds=step.plan_seconds,
            wait_seconds=wait_seconds,
            finish_seconds=finish_seconds,
        )
        self._observers.tell("pagedcore_step_finished", stats=stats)

    def _tell_ended(self) -> None:
        now = time.monotonic()
        for request, reason in self._scheduler.take_ended():
            record = record_of(request, reason, now)
            self._observers.tell("pagedcore_request_finished", record=record)


class _FailedStep:
    """A launch that raised: told when its turn comes, so that results stay in order."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> StepResult:
        raise self._error
