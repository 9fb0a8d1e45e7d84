"""Failures end those they belong to, and nobody else."""

import numpy as np

from pagedcore.step import StepResult


def fail(rig, message="the device failed"):
    return rig.scheduler.fail_step(rig.in_flight.popleft(), message)


def ids(output):
    return sorted(end.request_id for end in output.finished)


def hashed(rig):
    return [block for block, key in enumerate(rig.pool.key_of) if key is not None]


def test_a_failed_step_ends_everybody_in_it(make_rig):
    """R18: all are told, the pool is whole, and the next request succeeds."""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3])
    rig.add([4, 5, 6])
    rig.plan()
    output = fail(rig)
    assert ids(output) == [1, 2]
    assert {(end.reason, end.message) for end in output.finished} == {
        ("error", "the device failed")
    }
    assert rig.pool.num_free == 39
    assert rig.stats["request_success_error"] == 2
    rig.add([1, 2, 3], max_tokens=2)
    assert rig.run() == {3: "length"}


def test_who_was_not_in_the_step_goes_on(make_rig):
    """ERR-4"""
    rig = make_rig(num_blocks=40, budget=4)
    rig.add(range(4), max_tokens=3)
    rig.plan()
    rig.add(range(10, 13), max_tokens=1)
    rig.plan()
    assert ids(fail(rig)) == [1]
    output = rig.finish(8)
    assert output.request_ids.tolist() == [2]
    assert ids(output) == [2]


def test_a_failed_steps_blocks_cannot_be_found(make_rig):
    """KV-11"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3, 4, 5])
    rig.plan()
    assert hashed(rig)
    fail(rig)
    assert hashed(rig) == []
    rig.add([1, 2, 3, 4, 5])
    assert rig.step() == {2: 5}


def test_blocks_of_earlier_steps_are_still_found(make_rig):
    """KV-11: only the entries of the failed step are removed."""
    rig = make_rig(num_blocks=40, budget=4)
    rig.add(range(6))
    rig.step()
    rig.plan()
    fail(rig)
    rig.add(range(6))
    assert rig.step() == {2: 2}


def test_what_was_found_in_a_step_that_failed_is_computed_again(make_rig):
    """KV-11, ERR-4: 2 began with blocks that 1 never wrote; its token in flight is dropped."""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3, 4, 5])
    rig.plan()
    rig.add([1, 2, 3, 4, 6], max_tokens=2)
    assert rig.plan() == {1: 1, 2: 1}
    assert ids(fail(rig)) == [1]
    assert rig.status(2) == "PREEMPTED"
    assert rig.plan() == {}, "its token has not drained"
    output = rig.finish(8)
    assert (output.tokens.tolist(), output.finished) == ([], [])
    assert rig.plan() == {2: 5}
    assert rig.finish(9).tokens.tolist() == [9]


def test_a_child_of_a_step_that_failed_computes_again(make_rig):
    """FORK-10, KV-11"""
    rig = make_rig(num_blocks=40, caching=False)
    rig.add(range(5), choices=2, max_tokens=2)
    rig.plan()
    assert rig.plan() == {1: 1, 2: 1}
    assert ids(fail(rig)) == [1]
    rig.finish(8)
    assert rig.plan() == {2: 5}


def test_a_row_that_began_in_a_failed_plan_without_running_begins_again(make_rig):
    """R18: the device may not have heard of it."""
    rig = make_rig(num_blocks=40, budget=4, max_num_seqs=4)
    rig.add(range(20, 28))
    rig.step()
    [first] = rig.fork(1, max_tokens=9)
    [second] = rig.fork(1, max_tokens=9)
    rig.step()
    assert rig.running == [1]
    rig.scheduler._planner._budget = 1
    assert rig.plan() == {1: 1}
    assert rig.running == [1, first, second]
    assert ids(fail(rig)) == [1]
    assert [rig.status(i) for i in (first, second)] == ["PREEMPTED", "PREEMPTED"]
    rig.scheduler._planner._budget = 4
    assert set(rig.run().values()) == {"length"}


def test_one_sequence_may_fail_alone(make_rig):
    """ERR-4"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3])
    rig.add([4, 5, 6])
    rig.plan()
    output = rig.finish(8, failed={0: "not finite"})
    assert [(end.request_id, end.message) for end in output.finished] == [(1, "not finite")]
    assert output.request_ids.tolist() == [2]
    assert rig.running == [2]


def test_who_hit_the_failing_ones_blocks_in_the_same_step_is_not_blamed(make_rig):
    """ERR-4, KV-11: both report numbers that are not finite, but only one began it."""
    rig = make_rig(num_blocks=40, budget=16)
    rig.add([1, 2, 3, 4, 5])
    rig.add([1, 2, 3, 4, 6], max_tokens=1)
    rig.plan()
    order = rig.last.request_ids.tolist()
    output = rig.finish(8, failed={order.index(1): "bad", order.index(2): "bad"})
    assert ids(output) == [1]
    assert rig.plan() == {2: 5}
    assert ids(rig.finish(8)) == [2]


def test_what_an_aborted_culprit_wrote_is_forgotten(make_rig):
    """KV-11, ASYNC-6: it was aborted while its failing step was in flight."""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3, 4, 5])
    rig.plan()
    rig.abort(1)
    rig.add([1, 2, 3, 4, 6])
    assert rig.plan() == {2: 1}
    assert fail(rig).finished == []
    assert rig.status(2) == "PREEMPTED"
    rig.finish(8)
    assert rig.plan() == {2: 5}


def test_both_steps_in_flight_may_fail(make_rig):
    """R18"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3, 4, 5])
    rig.plan()
    rig.add([1, 2, 3, 4, 6], max_tokens=1)
    rig.plan()
    assert ids(fail(rig)) == [1]
    assert fail(rig).finished == [], "2 had to begin again anyway"
    assert rig.run() == {2: "length"}
    assert rig.pool.num_free == 39


def test_a_failure_of_somebody_who_has_left_changes_nothing(make_rig):
    """CANCEL-2"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3])
    rig.add([4, 5, 6], max_tokens=2)
    rig.plan()
    rig.abort(1)
    plan = rig.in_flight.popleft()
    result = StepResult(np.array([8, 8], np.int32), failed={0: "not finite"})
    assert rig.scheduler.finish_step(plan, result).finished == []
    assert rig.run() == {2: "length"}
