"""Two steps in flight: planned before the first one's tokens are known."""

import numpy as np
import pytest

from pagedcore.step import TokenLogprobs


def tokens_of(output):
    return dict(zip(output.request_ids.tolist(), output.tokens.tolist(), strict=True))


def entry(token):
    one = np.array([token], np.int32)
    return TokenLogprobs(one, np.zeros(1, np.float32), np.ones(1, np.int32))


def test_the_next_step_is_planned_before_the_last_token_is_known(make_rig):
    """ASYNC-1"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3])
    assert rig.plan() == {1: 3}
    assert rig.plan() == {1: 1}
    assert rig.last.num_computed.tolist() == [3]
    assert tokens_of(rig.finish(8)) == {1: 8}
    assert rig.plan() == {1: 1}
    assert tokens_of(rig.finish(9)) == {1: 9}
    assert rig.table.outputs(0).tolist() == [8, 9]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_sequence_with_all_its_tokens_in_flight_is_not_scheduled_again(make_rig, depth):
    """ASYNC-2, ASYNC-7: as many forward passes as without overlap."""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3], max_tokens=4)
    launched = 0
    while rig.scheduler.has_work:
        if len(rig.in_flight) < depth and rig.plan():
            launched += 1
        else:
            rig.finish()
    assert launched == 4


def test_the_models_limit_stops_planning_too(make_rig):
    """ASYNC-2"""
    rig = make_rig(num_blocks=40, max_model_len=5)
    rig.add([1, 2, 3], max_tokens=99)
    assert rig.plan()
    assert rig.plan()
    assert rig.plan() == {}


@pytest.mark.parametrize("option", [{"eos": 9}, {"stop_token_ids": [9]}])
def test_a_step_too_many_is_dropped(make_rig, option):
    """ASYNC-3: no token, no usage, no log-probability."""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3], logprobs=1, **option)
    rig.plan()
    rig.plan()
    output = rig.finish(9, logprobs={0: entry(9)})
    assert [end.reason for end in output.finished] == ["stop"]
    assert set(output.logprobs) == {1}
    late = rig.finish(5, logprobs={0: entry(5)})
    assert (late.tokens.tolist(), late.finished, late.logprobs) == ([], [], {})
    assert rig.stats["generation_tokens"] == 1
    assert rig.pool.num_free == 39


def test_a_row_given_away_gets_no_late_token(make_rig):
    """ASYNC-3, EN-4: the next owner of row 0 must not see what was drawn for the last."""
    rig = make_rig(num_blocks=40, max_num_seqs=1)
    rig.add([1, 2, 3], eos=9)
    rig.plan()
    rig.plan()
    rig.finish(9)
    second = rig.add([4, 5])
    rig.plan()
    assert rig.sequence(second).row == 0
    assert tokens_of(rig.finish(6)) == {}
    assert tokens_of(rig.finish(7)) == {second: 7}


def test_an_id_that_is_used_again_gets_no_late_token(make_rig):
    """ASYNC-6, IN-26"""
    rig = make_rig(num_blocks=40)
    first = rig.request([1, 2, 3])
    rig.scheduler.add(first)
    rig.plan()
    rig.abort(first.id)
    again = rig.request([1, 2, 3])
    again.id = first.id
    rig.scheduler.add(again)
    rig.plan()
    assert tokens_of(rig.finish(6)) == {}
    assert tokens_of(rig.finish(7)) == {first.id: 7}


def test_tokens_in_flight_of_a_victim_are_delivered_and_drain_first(make_rig):
    """ASYNC-5"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3])
    rig.plan()
    rig.plan()
    rig.scheduler._roster.preempt(rig.sequence(1).row)
    assert rig.plan() == {}
    assert tokens_of(rig.finish(8)) == {1: 8}
    assert rig.plan() == {}, "one more is in flight"
    assert tokens_of(rig.finish(9)) == {1: 9}
    assert rig.plan() == {1: 3}, "3 of 5 tokens: one block was found"
    assert rig.sequence(1).request.num_preemptions == 1
    assert rig.last.admitted[0].token_ids.tolist() == [1, 2, 3, 8, 9]


def test_a_victims_late_token_may_end_it(make_rig):
    """ASYNC-5: it leaves the queue, and is told once."""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3], eos=9)
    rig.plan()
    rig.plan()
    rig.scheduler._roster.preempt(rig.sequence(1).row)
    output = rig.finish(9)
    assert [end.reason for end in output.finished] == ["stop"]
    assert output.num_cached_tokens == {1: 0}
    assert rig.finish(5).finished == []
    assert not rig.scheduler.has_work


def test_a_victims_prompt_scores_in_flight_are_delivered(make_rig):
    """ASYNC-5, KV-10: and not again when the prompt is computed again."""
    rig = make_rig(num_blocks=40, budget=4)
    rig.add(range(6), prompt_logprobs=0)
    rig.plan()
    rig.scheduler._roster.preempt(rig.sequence(1).row)
    assert rig.finish(prompt_logprobs={0: list("abcd")}).prompt_logprobs == {1: list("abcd")}
    rig.plan()
    assert rig.finish(prompt_logprobs={0: list("abcd")}).prompt_logprobs == {}
    rig.plan()
    assert rig.finish(prompt_logprobs={0: list("e")}).prompt_logprobs == {1: list("e")}


def test_an_abort_between_launch_and_result_drops_the_result(make_rig):
    """ASYNC-6, EN-4, CANCEL-2"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3])
    rig.add([4, 5, 6])
    rig.plan()
    rig.abort(1)
    assert tokens_of(rig.finish(8)) == {2: 8}


def test_an_abort_after_the_last_token_was_drawn_ends_it_once(make_rig):
    """EN-6: the abort wins, and nothing is told twice."""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3], max_tokens=1)
    rig.plan()
    rig.abort(1)
    output = rig.finish(8)
    assert (output.tokens.tolist(), output.finished) == ([], [])
    assert rig.stats["request_success_abort"] == 1
    assert rig.stats["request_success_length"] == 0


def test_results_come_in_the_order_of_the_plans(make_rig):
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3])
    rig.plan()
    rig.plan()
    rig.in_flight.reverse()
    with pytest.raises(AssertionError, match="order of the plans"):
        rig.finish()


def test_a_block_filled_in_flight_is_found_after_the_end(make_rig):
    """KV-7: with and without overlap the same blocks stay in the cache."""
    found = []
    for depth in (1, 2):
        rig = make_rig(num_blocks=40)
        rig.add([1, 2, 3], max_tokens=4)
        while rig.scheduler.has_work:
            if len(rig.in_flight) >= depth or not rig.plan():
                rig.finish()
        while rig.in_flight:
            rig.finish()
        found.append(sum(key is not None for key in rig.pool.key_of))
    assert found == [3, 3]
