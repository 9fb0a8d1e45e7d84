"""A scheduler, the hash model and an oracle in one: every operation is checked when it returns.

A driver chooses operations and values; the world carries them out, compares every token and every
ending with the unbatched reference, and counts blocks anew. It draws no random numbers.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagedcore.cache_spec import CacheGroup, CacheSpec
from pagedcore.config import SchedulerConfig
from pagedcore.errors import RequestError
from pagedcore.request import FinishReason, Request
from pagedcore.scheduling.policies import FirstComeFirstServed, Priority
from pagedcore.scheduling.scheduler import Scheduler
from pagedcore.scheduling.sequence import SequenceState, Status
from pagedcore.step import StepOutput, StepPlan
from pagedcore.testing import scheduler_checks as checks
from pagedcore.testing.hash_model import Fault, HashModel, PendingHashStep
from pagedcore.testing.scheduler_oracle import Oracle, Tracked
from pagedcore.testing.scheduler_watch import Watch

MOST_IDLE_STEPS = 500
"""Steps without a token or an ending, while somebody is live, that are a deadlock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldConfig:
    """A small world: prefixes are shared, memory is short and hashes collide all the time."""

    num_blocks: int = 12
    """The null block included."""

    block_size: int = 2
    """Positions per block."""

    max_num_seqs: int = 4
    """Rows."""

    budget: int = 8
    """Tokens per step."""

    max_model_len: int = 16
    """Longest sequence."""

    windows: tuple[int | None, ...] = (None,)
    """One cache group for each."""

    vocab_size: int = 2
    """Tokens that the model draws."""

    depth: int = 2
    """Steps in flight; 1 is without overlap."""

    prefix_caching: bool = True
    """Whether prefixes are cached."""

    hash_bytes: int | None = None
    """Hashes are cut to so many bytes, collide, and are not trusted (KV-13)."""

    priorities: bool = False
    """Whether the policy is by priority."""

    chunked: bool = True
    """Whether prompts are cut."""

    threshold: int = 0
    """Most prompt tokens of one sequence in a step."""

    reserves_all: bool = True
    """Whether a prompt is admitted only when all of it fits."""

    watermark: float = 0.0
    """Share of blocks that admission leaves free."""


@dataclass(slots=True)
class _InFlight:
    plan: StepPlan
    pending: PendingHashStep
    fault: Fault | None


class World:
    """See the head of the module. Raises AssertionError as soon as anything is wrong."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        groups = [
            CacheGroup(CacheSpec(num_kv_heads=1, head_dim=1, window=window), (layer,))
            for layer, window in enumerate(config.windows)
        ]
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.budget,
                enable_chunked_prefill=config.chunked,
                long_prefill_token_threshold=config.threshold,
                scheduler_reserve_full_isl=config.reserves_all,
            ),
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            groups=groups,
            max_model_len=config.max_model_len,
            enable_prefix_caching=config.prefix_caching,
            hash_algorithm="sha256",
            kv_watermark=config.watermark,
            policy=Priority() if config.priorities else FirstComeFirstServed(),
            seed=1,
        )
        self.model = HashModel(
            num_rows=config.max_num_seqs,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            groups=groups,
            vocab_size=config.vocab_size,
        )
        self.longest = self.scheduler._longest
        self.oracle = Oracle(
            config.windows,
            block_size=config.block_size,
            vocab_size=config.vocab_size,
            longest=self.longest,
        )
        self.watch = Watch(self.scheduler, self.model)
        self.budget = config.budget
        self.in_flight: deque[_InFlight] = deque()
        self.num_requests = 0
        self.num_forced = 0
        """Preemptions that were asked for."""
        self._num_idle = 0
        self._cut_hashes()

    def _cut_hashes(self) -> None:
        hasher, size = self.scheduler._cache._hasher, self.config.hash_bytes
        if size is not None and hasher is not None:
            digest = hasher._digest
            hasher.is_cryptographic = False
            hasher._digest = lambda data: digest(data)[:size]

    @property
    def live(self) -> dict[int, Tracked]:
        """Requests that have not ended, by id."""
        return self.oracle.live

    # Requests

    def request(self, prompt: Sequence[int], **fields: Any) -> Request:
        """A request with the next id and arrival."""
        self.num_requests += 1
        request = Request(
            id=self.num_requests, prompt_token_ids=np.array(prompt, np.int32), **fields
        )
        request.arrival_time = float(request.id)
        return request

    def add(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queue a request that fits, and its other choices."""
        self.scheduler.add(request, forks)
        self.oracle.track(request, (), is_child=False)
        for fork in forks:
            self.oracle.track(fork, (), is_child=True)
        self.check()

    def refuse(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queue what must be refused: nothing changes."""
        before = self.watch.snapshot()
        try:
            self.scheduler.add(request, forks)
        except RequestError:
            pass
        else:
            raise AssertionError("20: a request that can never run was taken")
        assert self.watch.snapshot() == before, "20: a refused request changed something"
        self.check()

    def fork(self, parent_id: int, children: Sequence[Request]) -> None:
        """Fork a live request."""
        parent = self.live[parent_id]
        self.scheduler.fork(parent_id, children)
        for child in children:
            assert child.output_token_ids == parent.outputs, "FORK-2: a child has other tokens"
            self.oracle.track(child, parent.outputs, is_child=True)
        self.check()

    def abort(self, request_ids: Sequence[int]) -> None:
        """Abort requests; unknown ids are allowed. Their blocks are back when it returns."""
        known = [request_id for request_id in request_ids if request_id in self.live]
        before = self.watch.snapshot()
        self.scheduler.abort(request_ids)
        assert known or self.watch.snapshot() == before, "POOL-8: an unknown id changed something"
        for request_id in known:
            self.oracle.forget(request_id, FinishReason.ABORT)
        self.check()

    def preempt(self, request_id: int) -> None:
        """Take a running request's blocks away, as a shortage would."""
        sequence = self.scheduler._roster.find(request_id)
        assert sequence is not None
        if sequence.status is Status.RUNNING:
            self.scheduler._roster.preempt(sequence.row)
            self.num_forced += 1
        self.check()

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes, if nothing is in use."""
        pool, before = self.scheduler._pool, self.watch.snapshot()
        free = pool.free_blocks()
        is_idle = pool.num_free == self.config.num_blocks - 1
        assert self.scheduler.reset_prefix_cache() == is_idle, "POOL-7: the answer is wrong"
        if is_idle:
            assert not any(pool.key_of), "13: a hash is left"
            assert pool.free_blocks() == free, "POOL-7: the order changed"
        else:
            assert self.watch.snapshot() == before, "POOL-7: a refused reset changed something"
        self.check()

    def evict_all(self) -> None:
        """Let everything that is free be used once for something else."""
        pool = self.scheduler._pool
        pool.release(pool.take(pool.num_free))
        self.watch.order_is_known = True
        self.check()

    def set_budget(self, budget: int) -> None:
        """Change the tokens of a step; never above the configured ones, which memory is for."""
        budget = min(max(budget, self.config.max_num_seqs), self.config.budget)
        self.budget = self.scheduler._planner._budget = budget

    # Steps

    @property
    def can_plan(self) -> bool:
        """Whether another step may be in flight; none may follow one that could not begin."""
        broken = any(step.fault and step.fault.before_anything for step in self.in_flight)
        return len(self.in_flight) < self.config.depth and not broken

    def plan(self, choose_fault: Callable[[StepPlan], Fault | None] = lambda plan: None) -> bool:
        """Plan a step and launch it; False when there is nothing to run."""
        running, pool = self._running(), self.scheduler._pool
        hashed = {block for block, key in enumerate(pool.key_of) if key is not None}
        plan = self.scheduler.plan_step()
        self._check_victims(running)
        if plan is None:
            assert self.in_flight or not self.live, "21: nobody runs, nothing is in flight"
            if not self._running():
                ready = [s.request.id for s in self._waiting() if not s.num_awaited]
                assert not ready, f"SCHED-5: {ready} wait behind somebody who is not ready"
            self.check()
            return False
        checks.check_plan(self.scheduler, plan, self.budget, hashed)
        computed = dict(zip(plan.rows.tolist(), plan.num_computed.tolist(), strict=True))
        for admission in plan.admitted:
            self.oracle.take_admission(admission, computed.get(admission.row))
            self._check_order(admission.request.id)
        fault = choose_fault(plan)
        self.model.faults.append(fault)
        self.in_flight.append(_InFlight(plan, self.model.launch(plan), fault))
        self.check()
        return True

    def finish(self) -> None:
        """Take the oldest step's result."""
        step = self.in_flight.popleft()
        if step.fault is not None:
            self.watch.order_is_known = False
        try:
            result = step.pending.result()
        except RuntimeError as error:
            output = self.scheduler.fail_step(step.plan, str(error))
        else:
            output = self.scheduler.finish_step(step.plan, result)
        self._take(output, step)
        self.check()

    def advance(self) -> None:
        """Plan a step if one more may be in flight, or else take a result."""
        if not (self.can_plan and self.plan()) and self.in_flight:
            self.finish()

    def drain(self) -> None:
        """Run until everybody has ended; nothing may be left."""
        while self.live or self.in_flight:
            self.advance()
        checks.check_idle(self.scheduler)
        stats = self.scheduler.stats()
        for reason, count in self.oracle.ended.items():
            assert stats[f"request_success_{reason}"] == count, "28: endings are miscounted"
        assert stats["generation_tokens"] == self.oracle.num_tokens, "28: tokens are miscounted"
        most = self.num_forced + 50 * (self.num_requests + self.oracle.num_tokens)
        assert stats["num_preemptions"] <= most, "21: preemption cascades"

    def _take(self, output: StepOutput, step: _InFlight) -> None:
        self._num_idle = 0 if len(output.tokens) or output.finished else self._num_idle + 1
        assert self._num_idle < MOST_IDLE_STEPS, "21: no progress"
        guilty = self._guilty(step)
        drawn = set(step.plan.request_ids[step.plan.samples].tolist())
        missing = (drawn & self.live.keys()) - set(output.request_ids.tolist())
        for end in self.oracle.take(output):
            assert end.reason is FinishReason.ERROR, "33: an ending without its token"
            assert end.request_id in guilty, "25: somebody else's failure ended a request"
            assert end.message, "25: an error without a reason"
            self.oracle.forget(end.request_id, FinishReason.ERROR)
        if step.fault is not None and step.fault.rows is None:
            missing |= guilty
        for request_id in missing & self.live.keys():  # only those that had to begin again
            sequence = self.scheduler._roster.find(request_id)
            assert sequence is not None
            assert sequence.trusted_from > 0, f"ASYNC-5: a token of {request_id} was lost"

    def _guilty(self, step: _InFlight) -> set[int]:
        if step.fault is None:
            return set()
        pairs = zip(step.plan.rows.tolist(), step.plan.request_ids.tolist(), strict=True)
        rows = step.fault.rows
        return {request_id for row, request_id in pairs if rows is None or row in rows}

    # Checks

    def check(self) -> None:
        """Everything that must hold between two operations."""
        self.watch.poison_released()
        checks.check_blocks(self.scheduler)
        checks.check_places(self.scheduler, self.live)
        checks.check_rows(self.scheduler)
        self.watch.check_free_order()
        if all(step.fault is None for step in self.in_flight):
            self._check_content()

    def _check_content(self) -> None:
        """Every slot that a sequence will look at, and every block that can be found, holds what
        the reference has there: wrong sharing shows even where counts are right.
        """
        table, size, cache = self.scheduler._table, self.config.block_size, self.model.cache
        for row in table.running.tolist():
            tracked = self.live[int(table.request_id[row])]
            computed = int(table.num_computed[row])
            end = min(computed, tracked.length)
            for group, window in enumerate(self.config.windows):
                first = 0 if window is None else max(0, computed - window + 1)
                positions = np.arange(first, end)
                blocks = table.block_tables[group, row, positions // size]
                is_right = cache[blocks, positions % size] == tracked.tags[group][first:end]
                assert is_right.all(), f"6: {tracked.request.id} sees garbage in {blocks.tolist()}"
        for block, key in enumerate(self.scheduler._pool.key_of):
            if key is not None:
                known = cache[block].tobytes() in self.oracle.blocks
                assert known, f"6: block {block} is in the map with garbage"

    def _running(self) -> list[int]:
        table = self.scheduler._table
        return [int(i) for i in table.request_id[table.running]]

    def _waiting(self) -> list[SequenceState]:
        queue = self.scheduler._roster.queue
        return [sequence for sequence in queue._heap if sequence not in queue._gone]

    def _check_order(self, request_id: int) -> None:
        """22: under FCFS nobody is admitted before an older one that is ready."""
        roster = self.scheduler._roster
        sequence = roster.find(request_id)
        assert sequence is not None
        if self.config.priorities or sequence.is_child:
            return
        older = [one for one in self._waiting() if one < sequence]
        ready = [one.request.id for one in older if not one.num_awaited]
        assert not ready, f"22: {request_id} overtook {ready}"

    def _check_victims(self, before: list[int]) -> None:
        """23: who was preempted is who the policy says."""
        after = set(self._running())
        gone = [i for i in before if i not in after]
        if not self.config.priorities:
            assert gone == before[len(before) - len(gone) :], "23: a victim was not the last"
            return
        requests = {i: self.live[i].request for i in before}
        ranks = {i: (r.priority, r.arrival_time) for i, r in requests.items()}
        stay = [ranks[i] for i in before if i in after]
        if gone and stay:
            assert max(stay) <= min(ranks[i] for i in gone), "23: a victim had a better rank"
