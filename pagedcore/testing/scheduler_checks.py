"""What must hold between any two calls of a scheduler, counted anew from its tables each time.

Numbers in messages are those of the invariants in the reliability notes. Everything raises
AssertionError. These look inside: they are for the scheduler's own tests.
"""

from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np

from pagedcore.scheduling.blocks import BlockPool
from pagedcore.scheduling.scheduler import Scheduler
from pagedcore.scheduling.sequence import SequenceState, Status
from pagedcore.step import StepPlan


def tables_of(scheduler: Scheduler) -> dict[tuple[int, int], list[int]]:
    """Blocks that each row holds in each group, by (group, row); null entries left out."""
    table = scheduler._table
    return {
        (group, row): [
            block
            for block in table.block_tables[group, row, : table.num_blocks[group, row]].tolist()
            if block != 0
        ]
        for group in range(len(table.num_blocks))
        for row in table.running.tolist()
    }


def check_blocks(scheduler: Scheduler) -> None:
    """Owners and counts, the free list, and the prefix cache's map."""
    pool = scheduler._pool
    tables = tables_of(scheduler)
    owners = Counter(block for blocks in tables.values() for block in blocks)
    for key, blocks in tables.items():
        assert len(set(blocks)) == len(blocks), f"4: table {key} holds a block twice: {blocks}"
    for block in range(1, pool.num_blocks):
        held, counted = owners[block], pool.refs[block]
        assert held == counted, f"1: block {block} has {held} owners and {counted} refs"
    free = pool.free_blocks()
    assert len(set(free)) == len(free), "2: the free list holds a block twice"
    unowned = {block for block in range(1, pool.num_blocks) if not owners[block]}
    assert set(free) == unowned, f"2: free {sorted(free)}, without an owner {sorted(unowned)}"
    assert pool.num_free == len(free), "2: the number of free blocks is wrong"
    check_map(pool)


def check_map(pool: BlockPool) -> None:
    """Hash to block and block to hash are inverse, and the null block has no part in them."""
    assert pool.key_of[0] is None, "5: the null block is hashed"
    assert pool.refs[0] == 0, "5: the null block is counted"
    entries: dict[int, bytes] = {}
    for key, first in pool._first.items():
        for block in (first, *pool._others.get(key, ())):
            assert block not in entries, f"6: block {block} is in the map twice"
            entries[block] = key
    assert set(pool._others) <= set(pool._first), "6: a key has later blocks and no first"
    hashed = {block: key for block, key in enumerate(pool.key_of) if key is not None}
    assert entries == hashed, "6: map and hashes disagree"


def check_places(scheduler: Scheduler, live: Iterable[int]) -> None:
    """Every live request is in exactly one place, and nobody else is in any."""
    roster, table = scheduler._roster, scheduler._table
    seats = [table.sequence(row) for row in table.running.tolist()]
    waiting = [one for one in roster.queue._heap if one not in roster.queue._gone]
    deferred: list[SequenceState] = []
    for parent in roster._parents:
        assert parent.forks, "17: a parent without pending forks"
        for fork in parent.forks:
            assert fork.children, "17: a fork without children"
            deferred += fork.children
            assert all(child.parent is parent for child in fork.children), "17: a lost child"
    places = [*seats, *waiting, *deferred]
    ids = sorted(sequence.request.id for sequence in places)
    assert ids == sorted(live), f"17: {ids} are somewhere, {sorted(live)} are live"
    assert len(roster) == len(ids), "17: the roster holds others"
    for row, sequence in zip(table.running.tolist(), seats, strict=True):
        assert (sequence.status, sequence.row) == (Status.RUNNING, row), "17: a wrong seat"
        assert sequence.num_awaited == 0, "17: a seated one awaits old tokens"
    assert all(s.status in (Status.WAITING, Status.PREEMPTED) for s in waiting), "17: queue"
    assert all(s.status is Status.DEFERRED for s in deferred), "17: deferred"
    assert roster.num_deferred == len(deferred), "28: deferred ones are miscounted"
    assert len(roster.queue) == len(waiting), "28: waiting ones are miscounted"
    tokens = sum(len(s.request.prompt_token_ids) for s in waiting if not s.is_child)
    assert roster.queue.num_tokens == tokens, "28: waiting tokens are miscounted"
    stats = scheduler.stats()
    assert stats["num_requests_running"] == len(seats), "28: running"
    assert stats["num_requests_waiting"] == len(waiting) + len(deferred), "28: waiting"
    used = sum(ref > 0 for ref in scheduler._pool.refs[1:])
    share = used / (scheduler._pool.num_blocks - 1)
    assert abs(stats["kv_cache_usage_perc"] - share) < 1e-9, "28: usage"
    num_rows = len(table.request_id)
    assert table.num_free_rows == num_rows - len(seats), "17: rows are lost"
    assert len(seats) <= num_rows, "16: too many run"


def check_rows(scheduler: Scheduler) -> None:
    """Counters of the running rows agree with each other and with the tables."""
    table, size = scheduler._table, scheduler._block_size
    for row in table.running.tolist():
        known, length = int(table.num_known[row]), int(table.length[row])
        computed = int(table.num_computed[row])
        assert known <= length <= known + 2, "ASYNC-1: more than two tokens are in flight"
        assert computed <= length, "18: more is computed than there is"
        assert length <= table.end[row], "ASYNC-2: a sequence went past its end"
        for group in range(len(table.num_blocks)):
            held = int(table.num_blocks[group, row])
            assert held == -(-computed // size), f"19: {held} blocks for {computed} positions"
            slid = int(table.num_slid[group, row])
            entries = table.block_tables[group, row, :held]
            assert (entries[:slid] == 0).all(), "SLOT-6: a block behind the window is kept"
            assert (entries[slid:] > 0).all(), "19: an entry is missing"


def check_plan(
    scheduler: Scheduler, plan: StepPlan, budget: int, hashed_before: Collection[int]
) -> None:
    """Sizes of one step, and whom its writes could hurt."""
    counts = plan.num_scheduled
    assert len(counts) > 0, "16: an empty step"
    assert int(counts.sum()) <= budget, f"16: {counts.sum()} tokens in a budget of {budget}"
    assert (counts >= 1).all(), "16: an entry of 0 tokens"
    table = scheduler._table
    after = plan.num_computed + counts
    assert (after == table.num_computed[plan.rows]).all(), "SCHED-7: counters lag"
    reaches = after == table.length[plan.rows] - plan.samples
    assert (reaches == plan.samples).all(), "SCHED-8: a token is drawn too early or not at all"
    assert (plan.request_ids == table.request_id[plan.rows]).all(), "17: rows and ids disagree"
    order = {row: i for i, row in enumerate(table.running.tolist())}
    for part in (plan.rows[: plan.num_single], plan.rows[plan.num_single :]):
        places = [order[row] for row in part.tolist()]
        assert places == sorted(places), "plans are in order of admission"
    check_writes(scheduler, plan, hashed_before)


def check_writes(scheduler: Scheduler, plan: StepPlan, hashed_before: Collection[int]) -> None:
    """12: a block that goes on being filled has one owner and no hash (FORK-4), and a step copies
    for its own sequences only, what they have (FORK-6, FORK-7).
    """
    table, pool, size = scheduler._table, scheduler._pool, scheduler._block_size
    copies = {(group, target): count for group, _, target, count in plan.copies.tolist()}
    for row, start in zip(plan.rows.tolist(), plan.num_computed.tolist(), strict=True):
        index, offset = divmod(start, size)
        if offset == 0:
            continue
        for group in range(len(table.num_blocks)):
            block = int(table.block_tables[group, row, index])
            shared = pool.refs[block] > 1 and pool.key_of[block] is None
            assert not shared, f"12: row {row} writes into block {block}, which others hold"
            copied = copies.pop((group, block), None)
            if copied is None:
                assert block not in hashed_before, f"12: row {row} writes into a cached block"
            else:
                assert copied == offset, f"12: {copied} slots are copied, not {offset}"
    assert not copies, f"FORK-7: copies for nobody in the step: {copies}"


def check_idle(scheduler: Scheduler) -> None:
    """Nobody is left: nothing is held, and every counter of the present is 0 (METRIC-10)."""
    roster, pool = scheduler._roster, scheduler._pool
    assert not scheduler.has_work, "26: somebody is left"
    assert len(roster.queue._heap) == len(roster.queue._gone), "26: the queue is not empty"
    assert not roster._live, "26: a live sequence is left"
    assert not roster._parents, "26: a parent is left"
    assert not roster.untold, "26: an untold sequence is left"
    assert roster.num_deferred == 0, "26: deferred"
    assert sum(pool.refs) == 0, "26: a block is held"
    assert pool.num_free == pool.num_blocks - 1, "26: blocks leaked"
    assert len(scheduler._table.running) == 0, "26: a row is held"
    assert scheduler.cache_usage == 0, "26: usage"
    assert np.all(scheduler._table.request_id == -1), "26: a row has an owner"
