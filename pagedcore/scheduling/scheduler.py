"""The scheduler: requests in, a plan per step out, results back in."""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from pagedcore.cache_spec import CacheGroup
from pagedcore.config import SchedulerConfig
from pagedcore.errors import ConfigError, OverloadedError, RequestError
from pagedcore.request import FinishReason, Request, SamplingParams
from pagedcore.scheduling.blocks import BlockPool
from pagedcore.scheduling.collector import Collector
from pagedcore.scheduling.hashing import BlockHasher
from pagedcore.scheduling.in_flight import StepInFlight
from pagedcore.scheduling.paging import Pager
from pagedcore.scheduling.planner import Planner
from pagedcore.scheduling.policies import Policy
from pagedcore.scheduling.prefix_cache import PrefixCache
from pagedcore.scheduling.roster import Roster, check_children
from pagedcore.scheduling.table import SequenceTable
from pagedcore.step import StepOutput, StepPlan, StepResult

MAX_CHILDREN = 128
"""Children of one fork (semantics FORK-1)."""


class Scheduler:
    """Decides what each step runs. Several steps may be in flight; results come in their order."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        block_size: int,
        groups: Sequence[CacheGroup],
        max_model_len: int,
        enable_prefix_caching: bool,
        hash_algorithm: str,
        kv_watermark: float,
        policy: Policy,
        seed: int,
        max_loras: int = 0,
    ) -> None:
        """`config` is resolved; `num_blocks` counts the null block. Raises ConfigError for limits
        that contradict each other.
        """
        max_num_seqs, budget = _step_limits(config, max_model_len)
        self._config = config
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._pool = BlockPool(num_blocks)
        self._table = SequenceTable(
            num_rows=max_num_seqs,
            max_model_len=max_model_len,
            num_groups=len(groups),
            max_blocks=-(-(max_model_len + 1) // block_size),
        )
        self._cache = PrefixCache(
            self._pool,
            self._table,
            [group.spec.window for group in groups],
            block_size,
            BlockHasher(hash_algorithm) if enable_prefix_caching else None,
        )
        self._pager = Pager(self._pool, self._table, groups, block_size)
        self._longest = bisect_right(  # tokens that one sequence can have, alone in the pool
            range(1, max_model_len + 1),
            num_blocks - 1,
            key=lambda length: self._pager.num_needed(length, min(length, budget)),
        )
        self._roster = Roster(
            self._table, self._pager, self._cache, policy, longest=self._longest, seed=seed,
            num_adapter_slots=max_loras,
        )  # fmt: skip
        self._planner = Planner(
            config, self._roster, self._table, self._pager, self._cache, self._pool,
            block_size=block_size, budget=budget, kv_watermark=kv_watermark,
        )  # fmt: skip
        self._collector = Collector(self._roster, self._table, self._cache)
        self._in_flight: deque[StepInFlight] = deque()
        self._num_rejected = {"queued_reqs": 0, "queued_tokens": 0}
        self._num_stalls = 0

    # Requests

    def add(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queue a request, and `forks` that share its prompt; all are taken or none.

        Raises RequestError for a prompt that can never fit, and OverloadedError when the queue is
        full (semantics QUEUE-1).
        """
        self._check_new([request, *forks])
        self._check_length(request)
        if request.pooling is not None and forks:
            raise RequestError("a request for a vector has one choice", "n")
        for fork in forks:
            if not np.array_equal(fork.prompt_token_ids, request.prompt_token_ids):
                raise RequestError("all choices of a request must have one prompt", "prompt")
            if fork.adapter_key != request.adapter_key:
                raise RequestError("all choices of a request must have one adapter", "model")
        self._check_queue(1 + len(forks), len(request.prompt_token_ids))
        sequence = self._roster.add(request)
        if forks:
            self._roster.defer(sequence, forks, len(request.prompt_token_ids) - 1)

    def fork(self, request_id: int, children: Sequence[Request]) -> None:
        """Let `children` go on from what a live request has now (semantics FORK-1).

        They take over its prompt, outputs, salt, priority and arrival; one that has the very same
        params as its parent draws with a seed of its own (FORK-9). Raises RequestError for an
        unknown or finished request, and when children are too many or could not produce a token.
        """
        parent = self._roster.find(request_id)
        if parent is None:
            raise RequestError(f"no live request has the id {request_id}", "request_id")
        if parent.request.pooling is not None:
            raise RequestError("a request for a vector cannot be forked", "request_id")
        if not 1 <= len(children) <= MAX_CHILDREN:
            raise RequestError(f"a fork makes 1..{MAX_CHILDREN} children, not {len(children)}", "n")
        self._check_new(children)
        outputs = self._roster.outputs(parent)
        check_children(len(outputs), children)
        for number, child in enumerate(children, 1):
            if child.params is parent.request.params:
                child.params = _reseeded(child.params, number)
            child.prompt_token_ids = parent.request.prompt_token_ids
            child.output_token_ids = list(outputs)
            child.cache_salt = parent.request.cache_salt
            child.adapter = parent.request.adapter
            child.adapter_key = parent.request.adapter_key
            child.priority = parent.request.priority
            child.owner = parent.request.owner
            child.arrival_time = parent.request.arrival_time
        length = len(parent.request.prompt_token_ids) + len(outputs)
        self._roster.defer(parent, children, length - 1)

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests in whatever state they are; unknown ones are ignored (CANCEL-2)."""
        for request_id in request_ids:
            sequence = self._roster.find(request_id)
            if sequence is not None:
                self._roster.end(sequence, FinishReason.ABORT)

    def keep_ended(self) -> None:
        """From now on, remember who ends, until `take_ended`."""
        self._roster.ended = []

    def take_ended(self) -> list[tuple[Request, FinishReason]]:
        """Who is over since the last call, in order; empty without `keep_ended`."""
        ended = self._roster.ended
        if not ended:
            return []
        self._roster.ended = []
        return ended

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False, changing nothing, while blocks are in use (POOL-7)."""
        return self._cache.reset()

    # Steps

    def plan_step(self) -> StepPlan | None:
        """What to run next; None when nobody can run before more results arrive.

        The plan counts as running: its result is asked for, in the order of the plans.
        """
        step = self._planner.plan()
        if step is None and not self._in_flight and len(self._roster):
            self._num_stalls += 1  # a victim that was alone: now it waits, and fits
            step = self._planner.plan()
        if step is None:
            return None
        self._in_flight.append(step)
        return step.plan

    def finish_step(self, plan: StepPlan, result: StepResult) -> StepOutput:
        """Take the result of the oldest step in flight."""
        return self._collector.finish(self._pop(plan), result, self._in_flight)

    def fail_step(self, plan: StepPlan, message: str) -> StepOutput:
        """The oldest step in flight failed: everybody in it ends, and nobody else."""
        return self._collector.fail(self._pop(plan), message, self._in_flight)

    def _pop(self, plan: StepPlan) -> StepInFlight:
        step = self._in_flight.popleft()
        assert step.plan is plan, "results must come in the order of the plans"
        return step

    # State

    @property
    def adapter_keys(self) -> set[str]:
        """Of the adapters that anybody runs with, or waits for."""
        return self._roster.adapter_keys()

    @property
    def has_work(self) -> bool:
        """Whether anybody runs or waits."""
        return len(self._roster) > 0

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._table.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row, or for the parent of their fork."""
        return len(self._roster.queue) + self._roster.num_deferred

    @property
    def cache_usage(self) -> float:
        """Share of blocks in use, in 0..1 (POOL-1)."""
        return self._pool.usage

    def stats(self) -> dict[str, float]:
        """Counters and gauges by name (semantics METRIC-3)."""
        roster, planner = self._roster, self._planner
        return {
            "num_requests_running": self.num_running,
            "num_requests_waiting": self.num_waiting,
            "num_requests_deferred": roster.num_deferred,
            "kv_cache_usage_perc": self.cache_usage,
            "num_preemptions": roster.num_preemptions,
            "prefix_cache_queries": planner.num_cache_queries,
            "prefix_cache_hits": planner.num_cache_hits,
            "prompt_tokens": planner.num_prompt_tokens,
            "prompt_tokens_cached": planner.num_prompt_tokens_cached,
            "generation_tokens": self._collector.num_tokens,
            "fork_requests": roster.num_forked,
            "cow_block_copies": self._pager.num_copies,
            "stalled_steps": self._num_stalls,
            **{f"request_success_{reason}": n for reason, n in roster.num_ended.items()},
            **{f"admission_rejections_{name}": n for name, n in self._num_rejected.items()},
            **roster.preemptions.stats(),
        }

    # Checks

    def _check_new(self, requests: Sequence[Request]) -> None:
        ids = [request.id for request in requests]
        for request_id in ids:
            if self._roster.find(request_id) is not None or ids.count(request_id) > 1:
                raise RequestError(f"the request id {request_id} is in use", "id")

    def _check_length(self, request: Request) -> None:
        """Refuse what could not run even alone: it would wait for ever."""
        length = len(request.prompt_token_ids)
        if length == 0:
            raise RequestError("the prompt must not be empty", "prompt")
        num_outputs = 0 if request.pooling is not None else 1
        if length + num_outputs > self._longest:
            blocks = self._pager.num_needed(length + num_outputs, length)
            raise RequestError(
                f"the prompt has {length} tokens and needs {blocks} blocks of {self._block_size} "
                f"for them and its output; the cache holds {self._pool.num_blocks - 1} blocks, and "
                f"max_model_len is {self._max_model_len}: shorten the prompt to at most "
                f"{self._longest - num_outputs} tokens",
                "prompt",
            )

    def _check_queue(self, num_sequences: int, num_tokens: int) -> None:
        checks = (
            ("queued_reqs", num_sequences, self.num_waiting, self._config.max_num_queued_reqs),
            ("queued_tokens", num_tokens, self._roster.queue.num_tokens,
             self._config.max_num_queued_tokens),
        )  # fmt: skip
        for reason, asked, waiting, limit in checks:
            name = f"max_num_{reason}"
            if limit and asked > limit:
                raise RequestError(f"the request alone exceeds {name}: {asked} of {limit}")
            if limit and waiting + asked > limit:
                self._num_rejected[reason] += 1
                raise OverloadedError(f"the queue is full ({name} is {limit})", reason)


def _reseeded(params: SamplingParams, number: int) -> SamplingParams:
    """What a child that inherits its parameters draws with: seed + number, as 64 bits (FORK-9)."""
    if params.seed is None:
        return params
    return replace(params, seed=(params.seed + number + 2**63) % 2**64 - 2**63)


def _step_limits(config: SchedulerConfig, max_model_len: int) -> tuple[int, int]:
    """`max_num_seqs` and `max_num_batched_tokens`, once they agree (CFG-3)."""
    max_num_seqs, budget = config.max_num_seqs, config.max_num_batched_tokens
    if max_num_seqs is None or budget is None:
        raise ConfigError("max_num_seqs and max_num_batched_tokens must be resolved")
    if budget < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({budget}) must be at least max_num_seqs ({max_num_seqs})"
        )
    if not config.enable_chunked_prefill and budget < max_model_len:
        raise ConfigError(
            f"without chunked prefill, max_num_batched_tokens ({budget}) must be at least "
            f"max_model_len ({max_model_len})"
        )
    return max_num_seqs, budget
