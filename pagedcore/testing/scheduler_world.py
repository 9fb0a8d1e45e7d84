"""A scheduler, the hash model and an oracle in one: every operation is checked when it returns.

A driver chooses operations and values; the world carries them out, compares every token and every
ending with the unbatched reference, and counts blocks anew. It draws no random numbers.
"""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pagedcore.cache_spec import CacheGroup, CacheSpec
from pagedcore.config import SchedulerConfig
from pagedcore.errors import RequestError
from pagedcore.request import FinishReason, Request
from pagedcore.scheduling.policies import FirstComeFirstServed, Priority
from pagedcore.scheduling.scheduler import Scheduler
from pagedcore.scheduling.sequence import Status
from pagedcore.step import Finished, Int32, StepOutput, StepPlan
from pagedcore.testing import scheduler_checks as checks
from pagedcore.testing.hash_model import (
    Fault,
    HashModel,
    PendingHashStep,
    UInt64,
    draw,
    reference_tags,
    salt_of,
    score,
)

MOST_IDLE_STEPS = 500
"""Steps without a token or an ending, while somebody is live, that are a deadlock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldConfig:
    """A small world: prefixes are shared, memory is short and hashes collide all the time."""

    num_blocks: int = 12
    block_size: int = 2
    max_num_seqs: int = 4
    budget: int = 8
    max_model_len: int = 16
    windows: tuple[int | None, ...] = (None,)
    """One cache group for each."""
    vocab_size: int = 2
    depth: int = 2
    """Steps in flight; 1 is without overlap."""
    prefix_caching: bool = True
    hash_bytes: int | None = None
    """Hashes are cut to so many bytes, and collide."""
    priorities: bool = False
    chunked: bool = True
    threshold: int = 0
    reserves_all: bool = True
    watermark: float = 0.0
    max_queued: int = 0


@dataclass(slots=True, eq=False)
class Tracked:
    """What the world knows of a live request: its tokens, and what the reference makes of them."""

    request: Request
    outputs: list[int]
    is_child: bool
    parent: "Tracked | None" = None
    seed: int | None = None
    num_cached: int | None = None
    was_told_cached: bool = False
    num_scored: int = 0
    num_computed: int = 0
    tags: list[UInt64] = field(default_factory=list)
    states: UInt64 = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def length(self) -> int:
        """Known tokens."""
        return len(self.request.prompt_token_ids) + len(self.outputs)

    def tokens(self) -> Int32:
        """Known tokens."""
        return np.array([*self.request.prompt_token_ids.tolist(), *self.outputs], np.int32)

    def compute(self, windows: Sequence[int | None]) -> None:
        """Let the reference look at all known tokens."""
        self.tags, self.states = reference_tags(self.tokens(), salt_of(self.request), windows)


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
                max_num_queued_reqs=config.max_queued,
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
        self.budget = config.budget
        self.live: dict[int, Tracked] = {}
        self.in_flight: deque[_InFlight] = deque()
        self.next_id = 0
        self.num_tokens = 0
        self.num_preemptions = 0
        self.ended = dict.fromkeys(FinishReason, 0)
        self._idle = 0
        self._released: set[int] = set()
        self._release_times: dict[int, int] = {}
        self._num_releases = 0
        self._valid: dict[bytes, bytes] = {}  # content of full blocks that some request has
        self._order_is_known = True
        self._watch()
        self._longest = self.scheduler._longest

    # Requests

    def request(self, prompt: Sequence[int], **fields: Any) -> Request:
        """A request with the next id."""
        self.next_id += 1
        return Request(
            id=self.next_id, prompt_token_ids=np.array(prompt, np.int32),
            arrival_time=float(self.next_id), **fields,
        )  # fmt: skip

    def add(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queue a request that fits, and its other choices."""
        self.scheduler.add(request, forks)
        parent = self._track(request, [], None)
        for fork in forks:
            self._track(fork, [], parent)
        self.check()

    def refuse(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queue what must be refused: nothing changes."""
        before = self._snapshot()
        try:
            self.scheduler.add(request, forks)
        except RequestError:
            pass
        else:
            raise AssertionError("20: a request that can never run was taken")
        assert self._snapshot() == before, "20: a refused request changed something"
        self.check()

    def fork(self, parent_id: int, children: Sequence[Request]) -> None:
        """Fork a live request."""
        parent = self.live[parent_id]
        self.scheduler.fork(parent_id, children)
        for child in children:
            assert child.output_token_ids == parent.outputs, "FORK-2: a child has other tokens"
            self._track(child, parent.outputs, parent)
        self.check()

    def _track(self, request: Request, outputs: list[int], parent: Tracked | None) -> Tracked:
        tracked = Tracked(request, list(outputs), parent is not None, parent)
        tracked.compute(self.config.windows)
        self.live[request.id] = tracked
        self._learn(tracked)
        return tracked

    def abort(self, request_ids: Sequence[int]) -> None:
        """Abort requests; unknown ids are allowed."""
        self.scheduler.abort(request_ids)
        for request_id in request_ids:
            if request_id in self.live:
                self._forget(request_id, FinishReason.ABORT)
        self.check()

    def preempt(self, request_id: int) -> None:
        """Take a running request's blocks away, as a shortage would."""
        sequence = self.scheduler._roster.find(request_id)
        assert sequence is not None
        if sequence.status is Status.RUNNING:
            self.scheduler._roster.preempt(sequence.row)
            self.num_preemptions += 1
            self.live[request_id].num_computed = 0
        self.check()

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes, if nothing is in use."""
        before = self._snapshot()
        free = self.scheduler._pool.free_blocks()
        idle = self.scheduler._pool.num_free == self.config.num_blocks - 1
        assert self.scheduler.reset_prefix_cache() == idle, "POOL-7: the answer is wrong"
        if idle:
            assert not any(self.scheduler._pool.key_of), "13: a hash is left"
            assert self.scheduler._pool.free_blocks() == free, "POOL-7: the order changed"
            self._release_times.clear()
        else:
            assert self._snapshot() == before, "POOL-7: a refused reset changed something"
        self.check()

    def evict_all(self) -> None:
        """Let everything that is free be used once for something else."""
        pool = self.scheduler._pool
        pool.release(pool.take(pool.num_free))
        self._poison_released()
        self._order_is_known = True
        self.check()

    def set_budget(self, budget: int) -> None:
        """Change the tokens of a step; never above the configured ones, which memory is for."""
        budget = min(max(budget, self.config.max_num_seqs), self.config.budget)
        self.budget = self.scheduler._planner._budget = budget

    # Steps

    @property
    def can_plan(self) -> bool:
        """Whether another step may be in flight."""
        broken = any(s.fault and s.fault.before_anything for s in self.in_flight)
        return len(self.in_flight) < self.config.depth and not broken

    def plan(self, choose_fault: Callable[[StepPlan], Fault | None] = lambda plan: None) -> bool:
        """Plan a step and launch it; False when there is nothing to run."""
        running = self._running()
        keys = {request_id: self._key(request_id) for request_id in running}
        plan = self.scheduler.plan_step()
        self._check_victims(running, keys)
        if plan is None:
            assert self.in_flight or not self.live, "21: nobody runs, nothing is in flight"
            self._poison_released()
            self.check()
            return False
        checks.check_plan(self.scheduler, plan, self.budget)
        self._check_admissions(plan)
        fault = choose_fault(plan)
        self.model.faults.append(fault)
        self.in_flight.append(_InFlight(plan, self.model.launch(plan), fault))
        self._poison_released()
        self.check()
        return True

    def finish(self) -> None:
        """Take the oldest step's result."""
        step = self.in_flight.popleft()
        if step.fault is not None:
            self._order_is_known = False  # entries that are taken out again stay in their places
        try:
            result = step.pending.result()
        except RuntimeError as error:
            output = self.scheduler.fail_step(step.plan, str(error))
        else:
            output = self.scheduler.finish_step(step.plan, result)
        self._idle += 1
        self._take(output, step)
        assert self._idle < MOST_IDLE_STEPS, "21: no progress"
        self.check()

    def drain(self) -> None:
        """Run until everybody has ended; nothing may be left."""
        while self.live or self.in_flight:
            if not (self.can_plan and self.plan()):
                self.finish()
        checks.check_idle(self.scheduler)
        stats = self.scheduler.stats()
        for reason, count in self.ended.items():
            assert stats[f"request_success_{reason}"] == count, "28: endings"
        assert stats["generation_tokens"] == self.num_tokens, "28: tokens"
        assert stats["num_preemptions"] == self.num_preemptions, "28: preemptions"

    def _take(self, output: StepOutput, step: _InFlight) -> None:
        ended = {end.request_id: end for end in output.finished}
        assert len(ended) == len(output.finished), "17: a request ended twice"
        assert len(set(output.request_ids.tolist())) == len(output.request_ids), "a token too many"
        self._take_details(output)
        for request_id, token in zip(
            output.request_ids.tolist(), output.tokens.tolist(), strict=True
        ):
            assert request_id in self.live, "CANCEL-2: a token for somebody who has ended"
            self._take_token(self.live[request_id], token, ended.pop(request_id, None))
        guilty = set(step.plan.request_ids.tolist()) if step.fault is not None else set()
        for request_id, end in ended.items():
            assert end.reason is FinishReason.ERROR, "an ending without its token"
            assert request_id in guilty, "25: somebody else's failure ended a request"
            assert end.message, "an error without a reason"
            self._forget(request_id, FinishReason.ERROR)
        if step.fault is not None and step.fault.rows is None:
            doubted = {i for i in guilty & self.live.keys() if self._began_again(i, step)}
            assert guilty & self.live.keys() == doubted, "R18: somebody outlived a failed step"

    def _take_token(self, tracked: Tracked, token: int, end: Finished | None) -> None:
        request = tracked.request
        assert tracked.seed is not None, "a token before any step"
        expected = draw(
            int(tracked.states[-1]), request, tracked.seed, tracked.length, self.config.vocab_size
        )
        assert token == expected, f"29: request {request.id} got {token}, not {expected}"
        tracked.outputs.append(token)
        tracked.compute(self.config.windows)
        self._learn(tracked)
        self.num_tokens += 1
        self._idle = 0
        wanted = expected_end(request, tracked.outputs, self._longest)
        got = None if end is None else (end.reason, end.stop_reason)
        assert got == wanted, f"33: request {request.id} ended with {got}, not {wanted}"
        if end is not None:
            scored = request.params.prompt_logprobs is None or tracked.is_child
            whole = tracked.num_scored == len(request.prompt_token_ids) - 1
            assert scored or whole, "KV-10: a prompt's log-probabilities are missing"
            self._forget(request.id, end.reason)

    def _take_details(self, output: StepOutput) -> None:
        produced = set(output.request_ids.tolist())
        for request_id, count in output.num_cached_tokens.items():
            tracked = self.live[request_id]
            assert request_id in produced, "USAGE-3: cached tokens without a token"
            assert not tracked.was_told_cached, "USAGE-3: told twice"
            assert count == tracked.num_cached, f"32: {count} cached, not {tracked.num_cached}"
            tracked.was_told_cached = True
        for request_id in produced:
            tracked = self.live[request_id]
            assert tracked.was_told_cached or tracked.is_child, "USAGE-3: cached tokens untold"
            wanted = tracked.request.params.logprobs is not None
            assert (request_id in output.logprobs) == wanted, "ASYNC-3: wrong log-probabilities"
        for request_id, entry in output.logprobs.items():
            state = int(self.live[request_id].states[-1])
            token = int(entry.token_ids[0])
            assert entry.logprobs == score(token, state).logprobs, "31: a log-probability"
        for request_id, entries in output.prompt_logprobs.items():
            tracked = self.live[request_id]
            prompt = tracked.request.prompt_token_ids.tolist()
            for entry in entries:
                at = tracked.num_scored
                wanted_entry = score(prompt[at + 1], int(tracked.states[at]))
                assert entry.token_ids[0] == prompt[at + 1], "31: a prompt token is skipped"
                assert entry.logprobs == wanted_entry.logprobs, "31: a prompt log-probability"
                tracked.num_scored += 1

    def _forget(self, request_id: int, reason: FinishReason) -> None:
        self.ended[reason] += 1
        self._idle = 0
        del self.live[request_id]

    # Checks

    def check(self) -> None:
        """Everything that must hold between two operations."""
        self._poison_released()
        checks.check_blocks(self.scheduler)
        checks.check_places(self.scheduler, self.live)
        checks.check_rows(self.scheduler)
        self._check_free_order()
        if all(step.fault is None for step in self.in_flight):
            self._check_content()

    def _check_content(self) -> None:
        """Every slot that a sequence will look at, and every block that can be found, holds what
        the reference has there: wrong sharing shows even where counts are right.
        """
        table, size = self.scheduler._table, self.config.block_size
        for row in table.running.tolist():
            tracked = self.live[int(table.request_id[row])]
            computed = int(table.num_computed[row])
            end = min(computed, tracked.length)
            for group, window in enumerate(self.config.windows):
                first = 0 if window is None else max(0, computed - window + 1)
                positions = np.arange(first, end)
                blocks = table.block_tables[group, row, positions // size]
                stored = self.model.cache[blocks, positions % size]
                assert (stored == tracked.tags[group][first:end]).all(), (
                    f"6: request {tracked.request.id} sees foreign content in {blocks.tolist()}"
                )
        for block, key in enumerate(self.scheduler._pool.key_of):
            if key is not None:
                content = self.model.cache[block].tobytes()
                assert content in self._valid, f"6: block {block} is in the map with garbage"

    def _learn(self, tracked: Tracked) -> None:
        size = self.config.block_size
        full = tracked.length // size
        start = 0 if not tracked.outputs else full - 1
        for tags in tracked.tags:
            for index in range(max(0, start), full):
                content = tags[index * size : (index + 1) * size].tobytes()
                self._valid[content] = content

    def _check_free_order(self) -> None:
        """9: unhashed blocks come first, then the least recently released."""
        if not self._order_is_known:
            return
        pool = self.scheduler._pool
        free = pool.free_blocks()
        hashed = [pool.key_of[block] is not None for block in free]
        assert hashed == sorted(hashed), "9: a cached block goes before an uncached one"
        times = [self._release_times.get(block, 0) for block in free if pool.key_of[block]]
        assert times == sorted(times), "9: the free list is not in order of release"

    def _check_admissions(self, plan: StepPlan) -> None:
        waiting = self.scheduler._roster.queue._heap
        rows = dict(zip(plan.rows.tolist(), plan.num_computed.tolist(), strict=True))
        for admission in plan.admitted:
            tracked = self.live[admission.request.id]
            if tracked.seed is None:
                tracked.seed = admission.seed
                asked = tracked.request.params.seed
                assert asked is None or asked == admission.seed, "30: another seed"
            assert tracked.seed == admission.seed, "30: the seed changed"
            tokens = admission.token_ids.tolist()
            assert tokens == tracked.tokens().tolist(), "PRE-2: tokens are lost or doubled"
            computed = rows.get(admission.row)
            if computed is None:
                continue
            assert computed <= tracked.length - 1, "8: a hit covers the last token"
            if not tracked.is_child:
                aligned = computed % self.config.block_size == 0
                assert aligned, "18: a sequence begins in the middle of a block"
                if tracked.num_cached is None:
                    tracked.num_cached = computed
            if not self.config.priorities and not tracked.is_child:
                ahead = [s.request.id for s in waiting if s < self._sequence(tracked)]
                ready = [i for i in ahead if i in self.live and not self._awaits(i)]
                assert not ready, f"22: {tracked.request.id} overtook {ready}"
        for request_id, computed in zip(
            plan.request_ids.tolist(), plan.num_computed.tolist(), strict=True
        ):
            self.live[request_id].num_computed = computed

    def _sequence(self, tracked: Tracked) -> Any:
        return self.scheduler._roster.find(tracked.request.id)

    def _began_again(self, request_id: int, step: _InFlight) -> bool:
        """Whether an earlier failure had made the request compute everything again."""
        sequence = self.scheduler._roster.find(request_id)
        return sequence is not None and sequence.trusted_from > 0 and len(step.plan.rows) > 0

    def _awaits(self, request_id: int) -> bool:
        sequence = self.scheduler._roster.find(request_id)
        return sequence is not None and sequence.num_awaited > 0

    def _running(self) -> list[int]:
        table = self.scheduler._table
        return [int(i) for i in table.request_id[table.running]]

    def _key(self, request_id: int) -> tuple[int, float]:
        request = self.live[request_id].request
        return request.priority, request.arrival_time

    def _check_victims(self, before: list[int], keys: dict[int, tuple[int, float]]) -> None:
        after = set(self._running())
        gone = [i for i in before if i not in after]
        stats = self.scheduler.stats()
        self.num_preemptions = max(self.num_preemptions, int(stats["num_preemptions"]))
        if not gone:
            return
        if self.config.priorities:
            stay = [keys[i] for i in before if i in after]
            assert not stay or max(stay) <= min(keys[i] for i in gone), "23: a wrong victim"
        else:
            assert gone == before[len(before) - len(gone) :], "23: a victim was not the last"

    # Watching the pool

    def _watch(self) -> None:
        """Poison what is given away, and look at every reservation."""
        pool, pager = self.scheduler._pool, self.scheduler._pager
        take, release, reserve = pool.take, pool.release, pager.reserve

        def take_and_poison(count: int) -> list[int]:
            blocks = take(count)
            self.model.poison(blocks)
            self._released.difference_update(blocks)
            return blocks

        def release_and_note(blocks: Any) -> None:
            listed = list(blocks)
            release(listed)
            for block in listed:
                if block != 0 and pool.refs[block] == 0:
                    self._num_releases += 1
                    self._release_times[block] = self._num_releases
                    self._released.add(block)

        def reserve_whole_or_nothing(rows: Int32, counts: Int32) -> bool:
            before, free = self._snapshot(), pool.num_free
            done = reserve(rows, counts)
            if not done:
                assert self._snapshot() == before, "10: a failed allocation changed something"
                table, size = self.scheduler._table, self.config.block_size
                ends = table.num_computed[rows] + counts
                new = np.maximum(-(-ends // size) - table.num_blocks[:, rows], 0).sum()
                most = new + (table.is_forked[rows].sum() * len(self.config.windows))
                assert most > free, "10: an allocation failed though there was room"
            return done

        for owner, name, watched in (
            (pool, "take", take_and_poison),
            (pool, "release", release_and_note),
            (pager, "reserve", reserve_whole_or_nothing),
        ):
            setattr(owner, name, watched)
        hasher, size = self.scheduler._cache._hasher, self.config.hash_bytes
        if size is not None and hasher is not None:
            digest = hasher._digest
            hasher.is_cryptographic = False
            hasher._digest = lambda data: digest(data)[:size]

    def _poison_released(self) -> None:
        pool = self.scheduler._pool
        self.model.poison([b for b in self._released if not pool.refs[b] and not pool.key_of[b]])
        self._released.clear()

    def _snapshot(self) -> Any:
        pool, table = self.scheduler._pool, self.scheduler._table
        return copy.deepcopy(
            (pool.refs, pool.key_of, pool.free_blocks(), table.num_blocks.tolist(),
             table.block_tables.tolist(), table.is_forked.tolist(), pool._first, pool._others,
             len(self.scheduler._roster), self.scheduler._roster.next_number)
        )  # fmt: skip


def expected_end(
    request: Request, outputs: list[int], longest: int
) -> tuple[FinishReason, int | None] | None:
    """STOP-1, written a second time."""
    params, last = request.params, outputs[-1]
    if last == request.eos_token_id and not params.ignore_eos:
        return FinishReason.STOP, None
    if last in params.stop_token_ids:
        return FinishReason.STOP, last
    full = len(request.prompt_token_ids) + len(outputs) >= longest
    if full or (params.max_tokens is not None and len(outputs) >= params.max_tokens):
        return FinishReason.LENGTH, None
    if len(outputs) < params.min_tokens or params.repetition_detection is None:
        return None
    detection = params.repetition_detection
    for size in range(detection.min_pattern_size, detection.max_pattern_size + 1):
        pattern, count = outputs[-size:], 0
        rest = list(outputs)
        while len(rest) >= size and rest[-size:] == pattern:
            rest, count = rest[:-size], count + 1
        if len(pattern) == size and count >= detection.min_count:
            return FinishReason.REPETITION, None
    return None


def smaller(config: WorldConfig, **changes: Any) -> WorldConfig:
    """The same world with some of it changed."""
    return replace(config, **changes)
