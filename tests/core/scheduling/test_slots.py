"""Where tokens go: how many blocks a step takes, and when it gets none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


def test_a_sequence_holds_as_many_blocks_as_its_step_writes(make_rig):
    """SLOT-1"""
    rig = make_rig(num_blocks=20, budget=5)
    rig.add(range(12))
    held = []
    for _ in range(4):
        rig.step()
        held.append(len(rig.blocks(1)))
    assert held == [3, 5, 6, 7]  # 5, 10, 12 and 13 positions


def test_a_failed_allocation_changes_nothing(make_rig):
    """SLOT-2, SLOT-3: the example"""
    rig = make_rig(num_blocks=5, budget=16, max_model_len=64)
    rig.add([1, 2, 3, 4], max_tokens=1)
    rig.run()
    assert rig.free == [3, 4, 2, 1]
    cache, pager = rig.scheduler._cache, rig.scheduler._pager
    roster, planner = rig.scheduler._roster, rig.scheduler._planner
    prompt = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], np.int32)
    sequence = roster.add(rig.request(prompt))
    prefix = cache.find(sequence, prompt)
    assert prefix == [[1, 2]]
    assert pager.num_needed(9, 5, prefix) == 3
    assert pager.num_unused(prefix) == 2
    assert not planner._fits(9, 4, 5, prefix)
    assert rig.free == [3, 4, 2, 1]
    assert rig.plan() == {}
    assert rig.free == [3, 4, 2, 1]


def test_hits_in_use_need_no_free_block(make_rig):
    """SLOT-2"""
    rig = make_rig(num_blocks=5, budget=16)
    rig.add([1, 2, 3, 4, 5], max_tokens=2)
    rig.add([1, 2, 3, 4, 6], max_tokens=2)
    assert rig.step() == {1: 5, 2: 1}
    assert rig.pool.num_free == 0


def test_a_prompt_waits_until_all_of_it_fits(make_rig):
    """SLOT-4: its first chunk would fit at once."""
    rig = make_rig(num_blocks=7, budget=4)
    rig.add([1, 2, 3, 4])
    rig.step()
    rig.add(range(20, 30), max_tokens=1)
    assert rig.step() == {1: 1}
    rig.abort(1)
    assert rig.step() == {2: 4}
    assert len(rig.blocks(2)) == 2, "a check, not a reservation"


def test_a_first_chunk_is_enough_when_only_chunks_are_checked(make_rig):
    """SLOT-4"""
    rig = make_rig(num_blocks=7, budget=4, scheduler_reserve_full_isl=False)
    rig.add([1, 2, 3, 4])
    rig.step()
    rig.add(range(20, 30), max_tokens=1)
    assert rig.step() == {1: 1, 2: 3}


def test_the_watermark_stays_free_while_something_runs(make_rig):
    """SLOT-5: floor(0.3 * 10) = 3 blocks."""
    rig = make_rig(num_blocks=11, budget=32, watermark=0.3)
    rig.add(range(10))  # nothing runs: all five are given
    rig.step()
    rig.add(range(20, 26))
    assert rig.step() == {1: 1}  # it takes a sixth block; 4 are free, 3 needed, 3 must stay
    rig.abort(1)
    assert rig.step() == {2: 6}


def test_blocks_behind_a_window_are_given_back(make_rig):
    """SLOT-6: W = 4, B = 2; at 6 computed, positions below 3 are out of sight."""
    rig = make_rig(num_blocks=20, windows=(4,), budget=6)
    rig.add(range(6))
    rig.step()
    first = rig.blocks(1)
    rig.step()
    assert rig.blocks(1)[:3] == [0, *first[1:]]
    assert rig.pool.refs[first[0]] == 0
    rig.step()
    assert rig.blocks(1)[:3] == [0, 0, first[2]]
    assert rig.pool.key_of[first[0]] is not None, "it can still be found"


def test_a_window_holds_a_bounded_number_of_blocks(make_rig):
    """SLOT-6"""
    rig = make_rig(num_blocks=8, windows=(4,), budget=4, max_model_len=50)
    rig.add(range(30), max_tokens=19)
    while rig.scheduler.has_work:
        rig.step()
        assert rig.pool.num_blocks - 1 - rig.pool.num_free <= 5
    assert rig.stats["num_preemptions"] == 0


@pytest.mark.parametrize(("windows", "longest"), [
    ((None,), 14), ((None, None), 6), ((None, 2), 6), ((2,), 64),
])  # fmt: skip
def test_no_sequence_grows_beyond_the_pool(make_rig, windows, longest):
    """MEM-6, EN-14: the longest sequence that fits alone ends with `length`."""
    rig = make_rig(num_blocks=8, windows=windows, max_model_len=64)
    rig.add([1, 2, 3], max_tokens=100)
    assert rig.run() == {1: "length"}
    assert rig.stats["generation_tokens"] == longest - 3


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(6, 20), st.integers(4, 12))
def test_tables_hold_exactly_what_was_computed(make_rig, lengths, num_blocks, budget):
    """SLOT-1, SCHED-12"""
    rig = make_rig(num_blocks=num_blocks, budget=budget, max_model_len=40)
    fitting = [length for length in lengths if length < min(40, 2 * (num_blocks - 1))]
    for length in fitting:
        rig.add(range(length), max_tokens=3)
    while rig.scheduler.has_work:
        counts = rig.step()
        assert sum(counts.values()) <= budget
        used = set()
        for request_id in rig.running:
            blocks = rig.blocks(request_id)
            assert len(blocks) == -(-rig.computed(request_id) // 2)
            used.update(blocks)
        assert len(used) + len(rig.free) == num_blocks - 1
    assert rig.pool.num_free == num_blocks - 1
