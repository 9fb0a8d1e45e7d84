"""What a step runs: budget, chunks, admission, preemption, policies."""

import pytest

from pagedcore.config import SchedulerConfig
from pagedcore.errors import ConfigError, RequestError
from pagedcore.request import FinishReason


def test_prompts_and_outputs_share_one_budget(make_rig):
    """SCHED-10, the example"""
    rig = make_rig(num_blocks=40, budget=8)
    rig.add(range(5))
    rig.add(range(10, 20))
    assert rig.plan() == {1: 5, 2: 3}
    assert rig.finish().request_ids.tolist() == [1]
    assert rig.plan() == {1: 1, 2: 7}
    assert rig.finish().request_ids.tolist() == [1, 2]
    assert rig.step() == {1: 1, 2: 1}


def test_sequences_that_run_one_token_come_first(make_rig):
    """SCHED-9: in order of admission, in both parts."""
    rig = make_rig(num_blocks=40, budget=8)
    rig.add(range(11))
    rig.step()
    rig.add(range(20, 25))
    rig.step()  # 3 of the first, 5 of the second
    rig.add(range(30, 36))
    assert list(rig.step().items()) == [(1, 1), (2, 1), (3, 6)]


def test_the_rows_are_the_same_object_while_they_do_not_change(make_rig):
    rig = make_rig(num_blocks=40, budget=8)
    rig.add(range(3))
    rig.add(range(10, 13))
    plans = []
    for _ in range(6):
        rig.plan()
        plans.append(rig.last)
        rig.finish()
    assert len({id(plan.rows) for plan in plans}) == 1
    rig.add(range(20, 23))
    rig.plan()
    assert rig.last.rows is not plans[-1].rows
    assert [plan.num_computed.tolist() for plan in plans[:3]] == [[0, 0], [3, 3], [4, 4]]


@pytest.mark.parametrize(("others", "first"), [(0, 8), (1, 3)])
def test_a_long_prompt_is_held_back_when_it_is_not_alone(make_rig, others, first):
    """SCHED-2: the threshold counts running and waiting ones together."""
    rig = make_rig(num_blocks=40, budget=8, long_prefill_token_threshold=3)
    rig.add(range(12))
    for _ in range(others):
        rig.add(range(20, 24))
    counts = rig.step()
    assert counts[1] == first
    if others:
        assert counts[2] == 3


def test_a_sequence_without_budget_is_skipped_and_stays(make_rig):
    """SCHED-2"""
    rig = make_rig(num_blocks=40, budget=4, max_num_seqs=3)
    rig.add(range(2))
    rig.step()
    rig.add(range(10, 22))
    for _ in range(3):
        assert rig.step() == {1: 1, 2: 3}
    assert rig.running == [1, 2]


def test_the_last_position_of_the_model_is_not_run(make_rig):
    """SCHED-2, STOP-1: a sequence ends with its model's last token, which nobody reads."""
    rig = make_rig(num_blocks=40, max_model_len=6)
    rig.add(range(3), max_tokens=100)
    assert rig.run() == {1: "length"}
    assert rig.stats["generation_tokens"] == 3


def test_the_last_of_the_running_is_the_victim(make_rig):
    """SCHED-3, SCHED-11: the example"""
    rig = make_rig(num_blocks=5, budget=8, max_model_len=9)
    rig.add([1, 2, 3, 4], max_tokens=3)
    rig.add([5, 6, 7, 8], max_tokens=3)
    assert rig.step() == {1: 4, 2: 4}
    assert (rig.blocks(1), rig.blocks(2)) == ([1, 2], [3, 4])
    assert rig.step() == {1: 1}
    assert rig.blocks(1) == [1, 2, 4]
    assert rig.free == [3]
    assert rig.status(2) == "PREEMPTED"
    assert rig.step() == {1: 1}, "2 hits a block and needs 2 more"
    assert rig.step() == {2: 3}
    assert rig.run() == {2: "length"}
    assert rig.stats["num_preemptions"] == 1


def test_a_victim_that_was_scheduled_leaves_the_step(make_rig):
    """SCHED-3: under PRIORITY it may stand in front, and its tokens go back to the budget."""
    rig = make_rig(num_blocks=5, budget=8, priorities=True, max_model_len=9)
    rig.add([1, 2, 3], priority=5)
    rig.step()
    rig.add([4, 5, 6, 7], priority=1)
    rig.step()
    assert rig.running == [1, 2]
    rig.step()  # 1 takes the last block, then 2 needs one: 1 is the victim
    assert rig.running == [2]
    assert rig.status(1) == "PREEMPTED"
    assert rig.sequence(1).request.num_preemptions == 1


def test_a_sequence_that_is_its_own_victim_lets_the_next_go_on(make_rig):
    """SCHED-3: under PRIORITY"""
    rig = make_rig(num_blocks=5, budget=8, priorities=True, max_model_len=9)
    rig.add([1, 2, 3], priority=9)
    rig.step()
    rig.add([4, 5, 6], priority=1)
    assert rig.step() == {1: 1, 2: 3}
    assert rig.step() == {2: 1}
    assert rig.status(1) == "PREEMPTED"


def test_nobody_is_admitted_in_a_step_that_preempted(make_rig):
    """SCHED-4"""
    rig = make_rig(num_blocks=5, budget=8, max_model_len=9)
    rig.add([1, 2, 3, 4], max_tokens=3)
    rig.add([5, 6, 7, 8], max_tokens=3)
    rig.step()
    rig.add([9], max_tokens=1)
    assert rig.step() == {1: 1}, "the one-token prompt would fit"
    assert rig.stats["num_preemptions"] == 1


def test_no_more_run_than_may(make_rig):
    """SCHED-4"""
    rig = make_rig(num_blocks=40, max_num_seqs=2)
    for i in range(3):
        rig.add([i, i])
    rig.step()
    assert rig.running == [1, 2]
    assert rig.scheduler.num_waiting == 1


def test_who_waits_never_preempts_who_runs(make_rig):
    """SCHED-4: not even with a better priority."""
    rig = make_rig(num_blocks=5, budget=8, priorities=True, max_model_len=9)
    rig.add([1, 2, 3, 4, 5], priority=5)
    rig.step()
    rig.add([1, 1, 1, 1], priority=0)
    rig.step()
    assert rig.running == [1]


def test_who_is_not_ready_does_not_block_the_queue(make_rig):
    """SCHED-5: 1 waits for its token in flight; 2 is admitted, and 1 stays in front of 3."""
    rig = make_rig(num_blocks=40, max_num_seqs=2)
    for i in range(3):
        rig.add([i, i])
    rig.step()
    rig.plan()
    for request_id in (1, 2):
        rig.scheduler._roster.preempt(rig.sequence(request_id).row)
    assert list(rig.plan()) == [3]
    rig.finish()
    assert list(rig.plan()) == [3, 1]


def test_a_prompt_that_may_not_be_cut_waits_and_blocks_those_behind(make_rig):
    """SCHED-6: head of line"""
    rig = make_rig(num_blocks=40, budget=10, max_model_len=10, enable_chunked_prefill=False)
    rig.add(range(6))
    rig.add(range(20, 26))
    rig.add([1])
    assert rig.step() == {1: 6}
    assert rig.step() == {1: 1, 2: 6, 3: 1}


def test_a_prompt_that_does_not_fit_blocks_those_behind(make_rig):
    """SCHED-6: the queue is served in order."""
    rig = make_rig(num_blocks=6, budget=16, max_model_len=10)
    rig.add(range(6))
    rig.add(range(20, 26))
    rig.add([1])
    assert rig.step() == {1: 6}
    assert rig.running == [1]


def test_counters_move_when_a_step_is_planned(make_rig):
    """SCHED-7"""
    rig = make_rig(num_blocks=40)
    rig.add(range(5))
    rig.plan()
    assert rig.computed(1) == 5


def test_nothing_is_drawn_in_the_middle_of_a_prompt(make_rig):
    """SCHED-8"""
    rig = make_rig(num_blocks=40, budget=4)
    rig.add(range(10))
    drawn = []
    for _ in range(3):
        rig.plan()
        drawn.append((rig.last.samples.tolist(), rig.finish(tokens=99).tokens.tolist()))
    assert drawn == [([False], []), ([False], []), ([True], [99])]


def test_a_plan_says_what_is_new_and_nothing_else(make_rig):
    """SCHED-9"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3], seed=5)
    rig.plan()
    first = rig.last
    [admission] = first.admitted
    assert (admission.row, admission.request.id, admission.seed) == (0, 1, 5)
    assert admission.token_ids.tolist() == [1, 2, 3]
    assert first.table_updates.tolist() == [[0, 0, 0, 1], [0, 0, 1, 2]]
    rig.finish()
    rig.plan()
    assert rig.last.admitted == []
    assert rig.last.table_updates.tolist() == []
    assert rig.last.copies.tolist() == []


def test_preemption_forgets_what_was_computed_and_keeps_the_tokens(make_rig):
    """PRE-1, PRE-2"""
    rig = make_rig(num_blocks=12, budget=16)
    rig.add([1, 2, 3], seed=9)
    rig.step(4)
    rig.step(5)
    sequence = rig.sequence(1)
    rig.scheduler._roster.preempt(sequence.row)
    assert (sequence.status.name, sequence.request.num_preemptions) == ("PREEMPTED", 1)
    assert sequence.request.output_token_ids == [4, 5]
    assert rig.pool.num_free == 11
    assert rig.plan() == {1: 1}, "four of five tokens are found again"
    [admission] = rig.last.admitted
    assert admission.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert admission.seed == 9
    assert rig.finish(6).tokens.tolist() == [6]


def test_a_victim_is_served_before_those_that_never_ran(make_rig):
    """PRE-1: at the front of the queue"""
    rig = make_rig(num_blocks=40, max_num_seqs=2)
    for i in range(3):
        rig.add([i, i])
    rig.step()
    rig.scheduler._roster.preempt(rig.sequence(2).row)
    rig.step()
    assert rig.running == [1, 2]


def test_a_victim_goes_to_its_ordered_place_under_priority(make_rig):
    """PRE-1"""
    rig = make_rig(num_blocks=40, max_num_seqs=1, priorities=True)
    rig.add([1, 1], priority=2)
    rig.step()
    rig.add([2, 2], priority=1)
    rig.scheduler._roster.preempt(rig.sequence(1).row)
    rig.step()
    assert rig.running == [2]


def test_priority_then_arrival_orders_the_queue(make_rig):
    """SCHED: PRIORITY"""
    rig = make_rig(num_blocks=40, max_num_seqs=1, priorities=True)
    late = rig.add([1, 1], priority=1, arrival=9.0, max_tokens=1)
    early = rig.add([2, 2], priority=1, arrival=3.0, max_tokens=1)
    urgent = rig.add([3, 3], priority=0, arrival=12.0, max_tokens=1)
    order = [next(iter(rig.step())) for _ in range(3)]
    assert order == [urgent, early, late]


def test_a_small_pool_serves_everybody_in_the_end(make_rig):
    """SCHED-12, EN-15, EN-18: preemptions stay in proportion."""
    rig = make_rig(num_blocks=7, budget=16, max_model_len=12)
    for i in range(8):
        rig.add([i, i, i], max_tokens=6)
    assert set(rig.run(most=500).values()) == {FinishReason.LENGTH}
    assert rig.stats["num_preemptions"] < rig.stats["generation_tokens"]


@pytest.mark.parametrize(("num_blocks", "max_model_len", "fits"), [(5, 64, 7), (40, 10, 9)])
def test_a_prompt_that_can_never_run_is_refused_with_the_three_numbers(
    make_rig, num_blocks, max_model_len, fits
):
    """EN-14, REQ-7: the longest that fits is accepted, one more is not."""
    rig = make_rig(num_blocks=num_blocks, budget=64, max_model_len=max_model_len)
    with pytest.raises(RequestError) as raised:
        rig.add(range(fits + 1))
    message = str(raised.value)
    assert f"{fits + 1} tokens and needs {-(-(fits + 2) // 2)} blocks" in message
    assert f"holds {num_blocks - 1} blocks" in message
    assert f"max_model_len is {max_model_len}" in message
    assert raised.value.param == "prompt"
    assert not rig.scheduler.has_work
    rig.add(range(fits), max_tokens=5)
    assert set(rig.run().values()) == {"length"}


def test_an_empty_prompt_and_an_id_in_use_are_refused(make_rig):
    """IN-3, IN-26"""
    rig = make_rig(num_blocks=40)
    with pytest.raises(RequestError, match="must not be empty"):
        rig.add([])
    request = rig.request([1, 2])
    rig.scheduler.add(request)
    with pytest.raises(RequestError, match="is in use"):
        rig.scheduler.add(request)
    twin = rig.request([1, 2])
    with pytest.raises(RequestError, match="is in use"):
        rig.scheduler.add(twin, [twin])


def test_limits_that_contradict_each_other_are_refused(make_rig):
    """CFG-3"""
    with pytest.raises(ConfigError, match=r"\(3\) must be at least max_num_seqs \(4\)"):
        make_rig(budget=3)
    with pytest.raises(ConfigError, match="without chunked prefill"):
        make_rig(budget=8, max_model_len=9, enable_chunked_prefill=False)
    with pytest.raises(ConfigError, match="must be resolved"):
        make_rig(budget=None)
    assert SchedulerConfig().max_num_seqs is None


def test_a_giant_prompt_is_not_starved_by_small_ones(make_rig):
    """SCHED-12, R17: under FCFS nobody overtakes it, though small ones would fit all the time."""
    rig = make_rig(num_blocks=21, budget=16, max_num_seqs=8, max_model_len=40)
    for i in range(4):
        rig.add([i] * 4, max_tokens=4)
    rig.step()
    giant = rig.add(range(34), max_tokens=1)
    behind = []
    for i in range(12):
        behind.append(rig.add([i] * 4, max_tokens=4))
        rig.step()
        if giant in rig.running:
            break
        assert not set(behind) & set(rig.running)
    assert giant in rig.running or rig.sequence(giant) is None
    assert len(behind) < 6
    assert set(rig.run().values()) == {FinishReason.LENGTH}


def test_a_small_prompt_waits_for_a_giant_no_longer_than_its_chunks_take(make_rig):
    """EN-19"""
    rig = make_rig(num_blocks=200, budget=16, max_model_len=300)
    rig.add(range(250), max_tokens=9)
    small = rig.add([1, 2, 3], max_tokens=1)
    steps = 0
    while rig.sequence(small):
        rig.step()
        steps += 1
    assert steps == 16  # 250 tokens in chunks of 16
