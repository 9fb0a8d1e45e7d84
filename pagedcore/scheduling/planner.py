"""One step's plan: spend the token budget on running rows, then on those that wait.

    S sequences in the step

Running rows come first, oldest first, and preempt each other when blocks run out; who waits never
preempts anybody.
"""

import time
from dataclasses import dataclass, field

import numpy as np

from pagedcore.config import SchedulerConfig
from pagedcore.scheduling.blocks import BlockPool
from pagedcore.scheduling.in_flight import StepInFlight
from pagedcore.scheduling.paging import Pager
from pagedcore.scheduling.prefix_cache import Prefix, PrefixCache
from pagedcore.scheduling.roster import Roster
from pagedcore.scheduling.sequence import SequenceState
from pagedcore.scheduling.steady import SteadyState
from pagedcore.scheduling.table import Batch, SequenceTable
from pagedcore.step import Admission, Bool, Int32, StepPlan

MAX_SET_ASIDE = 256
"""Sequences that a step looks past because their adapters have no slot."""


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    budget: int
    rows: Int32
    """[S] Running rows that take part, in order of admission."""

    counts: Int32
    """[S] Tokens that each runs."""

    num_computed: Int32 | None = None
    """[S] What was computed before, where it is known without looking."""

    admitted: list[SequenceState] = field(default_factory=list)
    """Those that have a row since the last plan."""

    preempted: bool = False


class Planner:
    """Plans steps of at most `budget` tokens."""

    def __init__(
        self,
        config: SchedulerConfig,
        roster: Roster,
        table: SequenceTable,
        pager: Pager,
        cache: PrefixCache,
        pool: BlockPool,
        *,
        block_size: int,
        budget: int,
        kv_watermark: float,
    ) -> None:
        self._roster = roster
        self._table = table
        self._pager = pager
        self._cache = cache
        self._pool = pool
        self._block_size = block_size
        self._budget = budget
        self._chunked = config.enable_chunked_prefill
        self._threshold = config.long_prefill_token_threshold or 0
        self._reserves_all = config.scheduler_reserve_full_isl
        self._watermark = int(kv_watermark * (pool.num_blocks - 1))
        self._last: Batch | None = None
        self._uniform: Batch | None = None  # the last in which everybody decoded
        self.num_cache_queries = 0
        """Tokens looked up at first admissions (KV-12)."""
        self.num_cache_hits = 0
        """Of these, tokens found."""
        self.num_prompt_tokens = 0
        """Prompt tokens admitted; once per prompt."""
        self.num_prompt_tokens_cached = 0

    def plan(self) -> StepInFlight | None:
        """The next step; None when nobody can run before results arrive."""
        forked = self._roster.join_forks()
        draft = self._continue_steadily()
        if draft is None:
            draft = self._continue_running([child for child, _ in forked])
        if not draft.preempted:  # SCHED-4
            self._admit_waiting(draft)
        if len(draft.rows) == 0:
            return None
        steady = self._table.steady
        if steady is not None and draft.num_computed is not None:
            steady.await_tokens()
            rows = steady.batch.rows
            plan = self._plan(draft, steady.batch, draft.num_computed, steady.trues, len(rows))
            return StepInFlight(plan, steady.batch, True, self._cache.take_log(), forked)
        return self._finish(draft, forked)

    # Running sequences

    def _continue_steadily(self) -> _Draft | None:
        """One token for every row, if that is how it has been going and nothing is in its way."""
        steady, self._table.steady = self._table.steady, None
        if steady is None or steady.num_left <= 0:
            return None
        rows = steady.batch.rows
        if len(rows) > self._budget or not self._pager.grow(steady.growing_rows()):
            return None
        self._table.steady = steady
        before = steady.advance()
        for filled in steady.filled_rows():
            self._cache.enter_next(filled)
        return _Draft(self._budget - len(rows), rows, steady.ones, before)

    def _continue_running(self, joined: list[SequenceState]) -> _Draft:
        rows = self._table.running
        wants = self._wants(rows)
        counts = np.minimum(wants, np.maximum(self._budget - (np.cumsum(wants) - wants), 0))
        if not counts.all():
            rows, counts = rows[counts > 0], counts[counts > 0]
        self._pager.slide(rows)
        draft = _Draft(self._budget, rows, counts, admitted=joined)
        if self._pager.reserve(rows, counts):
            draft.budget -= int(counts.sum())
        else:
            self._continue_one_by_one(draft)
        self._table.num_computed[draft.rows] += draft.counts
        self._enter_full_blocks(draft.rows)
        return draft

    def _enter_full_blocks(self, rows: Int32) -> None:
        """Let others find what is full of known tokens, and written or about to be (KV-11)."""
        table = self._table
        self._cache.enter(rows, np.minimum(table.num_computed[rows], table.num_known[rows]))

    def _wants(self, rows: Int32) -> Int32:
        """Tokens that each row would run, were there no budget (SCHED-2, ASYNC-2)."""
        table = self._table
        length = table.length[rows]
        wants: Int32 = np.where(length < table.end[rows], length - table.num_computed[rows], 0)
        if self._limits_prompts():
            np.minimum(wants, self._threshold, out=wants)
        return wants

    def _limits_prompts(self) -> bool:
        return self._threshold > 0 and len(self._roster) > 1

    def _continue_one_by_one(self, draft: _Draft) -> None:
        """Blocks are short: preempt until each next row has what it needs (SCHED-3)."""
        table = self._table
        granted: dict[int, int] = {}
        for row in table.running.tolist():
            if table.request_id[row] < 0:  # preempted
                continue
            want = min(int(self._wants(np.array([row], np.int32))[0]), draft.budget)
            if want > 0 and self._reserve(row, want, granted, draft):
                granted[row] = want
                draft.budget -= want
        draft.rows = np.array(list(granted), np.int32)
        draft.counts = np.array(list(granted.values()), np.int32)

    def _reserve(self, row: int, want: int, granted: dict[int, int], draft: _Draft) -> bool:
        """Preempt others until `row` has its slots; False when the policy chose the row itself."""
        table, one = self._table, np.array([row], np.int32)
        self._pager.slide(one)
        while not self._pager.reserve(one, np.array([want], np.int32)):
            running = table.running.tolist()
            requests = [table.sequence(other).request for other in running]
            victim = running[self._roster.policy.victim(requests)]
            draft.preempted = True
            draft.budget += granted.pop(victim, 0)
            sequence = self._roster.preempt(victim)
            if sequence in draft.admitted:
                draft.admitted.remove(sequence)
            if victim == row:
                return False
        return True

    # Waiting sequences

    def _admit_waiting(self, draft: _Draft) -> None:
        """Admit in the order of the queue, until one does not fit (SCHED-4 to SCHED-6)."""
        queue = self._roster.queue
        adapters = self._roster.adapters
        not_ready: list[SequenceState] = []
        lacks_slot, num_passed = False, 0
        rows, counts = [], []
        while draft.budget > 0 and self._table.num_free_rows > 0:
            sequence = queue.first()
            if sequence is None:
                break
            if sequence.num_awaited > 0:  # ASYNC-5
                queue.pop()
                not_ready.append(sequence)
                continue
            key = sequence.request.adapter_key
            if not adapters.admits(key, passes=lacks_slot):  # LORA-1
                if len(not_ready) >= MAX_SET_ASIDE:
                    break
                queue.pop()
                not_ready.append(sequence)
                lacks_slot = True
                continue
            count = self._admit(sequence, draft)
            if count == 0:
                break
            draft.budget -= count
            num_passed += lacks_slot and bool(key)
            rows.append(sequence.row)
            counts.append(count)
        queue.put_back(not_ready)
        adapters.count_passed(num_passed if lacks_slot else None)
        if rows:
            draft.rows = np.append(draft.rows, np.array(rows, np.int32))
            draft.counts = np.append(draft.counts, np.array(counts, np.int32))

    def _admit(self, sequence: SequenceState, draft: _Draft) -> int:
        """Give a waiting sequence a row and its first slots; the tokens that it runs, or 0."""
        pager, table = self._pager, self._table
        tokens = sequence.known_tokens()
        prefix = self._cache.find(sequence, tokens)
        cached = pager.prefix_length(prefix)
        count = len(tokens) - cached
        if self._limits_prompts() and self._chunked:
            count = min(count, self._threshold)
        if count > draft.budget:
            if not self._chunked:
                return 0
            count = draft.budget
        if not self._fits(len(tokens), cached, count, prefix):
            return 0
        self._count_admission(sequence, len(tokens), cached)
        row = self._roster.join(sequence, tokens, prefix)
        one = np.array([row], np.int32)
        reserved = pager.reserve(one, np.array([count], np.int32))
        assert reserved, "a sequence was admitted that does not fit"
        table.num_computed[row] += count
        self._enter_full_blocks(one)
        draft.admitted.append(sequence)
        return count

    def _fits(self, length: int, cached: int, count: int, prefix: Prefix) -> bool:
        """Whether the blocks can be had (SLOT-2, SLOT-4, SLOT-5)."""
        pager = self._pager
        total = length if self._reserves_all else cached + count
        needed = pager.num_needed(total, count, prefix)
        free = self._pool.num_free - pager.num_unused(prefix)
        if len(self._table.running):
            free -= self._watermark
        return needed <= free

    def _count_admission(self, sequence: SequenceState, length: int, cached: int) -> None:
        """Only what a prompt's first look-up finds counts for it (KV-12)."""
        if sequence.was_admitted or sequence.is_child:
            return
        if self._cache.reads(sequence):
            self.num_cache_queries += length
            self.num_cache_hits += cached
        sequence.request.num_cached_tokens = cached
        sequence.request.first_scheduled_time = time.monotonic()
        self._roster.untold.add(sequence)
        self.num_prompt_tokens += length
        self.num_prompt_tokens_cached += cached

    # The plan

    def _finish(
        self, draft: _Draft, forked: list[tuple[SequenceState, SequenceState]]
    ) -> StepInFlight:
        """Put a draft into the order of batches, and note who will draw a token."""
        table = self._table
        rows, counts = draft.rows, draft.counts
        single = counts == 1
        num_single = int(np.count_nonzero(single))
        if not single[:num_single].all():
            rows = np.concatenate((rows[single], rows[~single]))
            counts = np.concatenate((counts[single], counts[~single]))
        batch = self._batch_of(rows)
        computed = table.num_computed[batch.rows]
        samples: Bool = computed == table.length[batch.rows]
        draws_all = bool(samples.all())
        table.length[batch.rows[samples]] += 1
        draft.rows, draft.counts = batch.rows, counts
        plan = self._plan(draft, batch, computed - counts, samples, num_single)
        if draws_all and num_single == len(table.running):
            self._note_uniform(batch)
        return StepInFlight(plan, batch, draws_all, self._cache.take_log(), forked)

    def _plan(
        self, draft: _Draft, batch: Batch, num_computed: Int32, samples: Bool, num_single: int
    ) -> StepPlan:
        updates, copies = self._pager.take_changes()
        return StepPlan(
            rows=batch.rows,
            num_computed=num_computed,
            num_scheduled=draft.counts,
            samples=samples,
            num_single=num_single,
            admitted=[
                Admission(
                    sequence.row,
                    sequence.request,
                    sequence.known_tokens(),
                    sequence.seed,
                    self._roster.adapters.slot_of(sequence.request.adapter_key),
                )
                for sequence in draft.admitted
            ],
            table_updates=updates,
            copies=copies,
            request_ids=batch.request_ids,
        )

    def _note_uniform(self, batch: Batch) -> None:
        """All rows decode: when they do so for the second time, it may go on."""
        if batch is self._uniform and not self._pager.slides:
            self._table.steady = SteadyState(self._table, batch, self._block_size)
        self._uniform = batch

    def _batch_of(self, rows: Int32) -> Batch:
        """Rows with those who hold them; the last step's, if they are the same."""
        table, last = self._table, self._last
        same = last is not None and np.array_equal(last.rows, rows)
        if last is None or not same or last.version != table.version:
            if last is not None and same:
                rows = last.rows
            self._last = last = Batch(
                rows, table.version, table.ticket[rows], table.request_id[rows]
            )
        return last
