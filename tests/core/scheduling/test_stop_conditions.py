"""When a sequence ends with its newest token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedcore.request import FinishReason, RepetitionDetection, Request, SamplingParams
from pagedcore.scheduling.stopping import is_repetition, why_ended
from pagedcore.scheduling.table import NUM_STOP_IDS
from pagedcore.testing.scheduler_oracle import expected_end

STOP, LENGTH, REPETITION = FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION


def end_of(outputs, *, eos=-1, max_model_len=100, prompt=3, **params):
    params.setdefault("max_tokens", 50)
    request = Request(
        id=1, prompt_token_ids=np.arange(prompt), params=SamplingParams(**params), eos_token_id=eos
    )
    end = min(prompt + params["max_tokens"], max_model_len)
    return why_ended(request, np.array(outputs, np.int32), end)


@pytest.mark.parametrize(
    ("outputs", "options", "end"),
    [
        ([4, 5], {}, None),
        ([4, 5], {"eos": 5}, (STOP, None)),
        ([5, 4], {"eos": 5}, None),
        ([4, 5], {"eos": 5, "ignore_eos": True}, None),
        ([4, 5], {"stop_token_ids": [5]}, (STOP, 5)),
        ([4, 5], {"eos": 5, "stop_token_ids": [5]}, (STOP, None)),
        ([4, 5], {"eos": 5, "ignore_eos": True, "stop_token_ids": [5]}, (STOP, 5)),
        ([4, 5], {"max_tokens": 2}, (LENGTH, None)),
        ([4, 5], {"max_model_len": 5}, (LENGTH, None)),
        ([4, 5], {"eos": 5, "max_tokens": 2}, (STOP, None)),
        ([4, 5], {"stop_token_ids": [5], "max_tokens": 2}, (STOP, 5)),
        # STOP-3: it was let through because nothing else was allowed
        ([5], {"eos": 5, "min_tokens": 3}, (STOP, None)),
        ([4, 5], {"min_tokens": 3, "max_model_len": 5}, (LENGTH, None)),
    ],
)
def test_conditions_are_checked_in_order(outputs, options, end):
    """STOP-1"""
    assert end_of(outputs, **options) == end


def detection(most, least, count):
    return RepetitionDetection(max_pattern_size=most, min_pattern_size=least, min_count=count)


@pytest.mark.parametrize(
    ("outputs", "rule", "found"),
    [
        ([1, 2, 1, 2, 1, 2], (2, 1, 3), True),
        ([1, 2, 1, 2, 1], (2, 1, 3), False),
        ([2, 1, 2, 1, 2], (2, 1, 2), True),
        ([7, 7, 7], (2, 1, 3), True),
        ([7, 7, 7], (2, 2, 2), False),
        ([7, 7, 7, 7], (2, 2, 2), True),
        ([1, 7, 7], (1, 1, 3), False),
        ([7, 7, 1], (1, 1, 2), False),
        ([], (4, 1, 2), False),
    ],
)
def test_a_pattern_that_stands_often_enough_is_found(outputs, rule, found):
    """STOP-5"""
    assert is_repetition(np.array(outputs, np.int32), detection(*rule)) == found


def test_a_loop_ends_the_output_at_its_sixth_token(make_rig):
    """STOP-5, the example"""
    rig = make_rig(num_blocks=40)
    rule = detection(2, 0, 3)
    rig.add([1, 2, 1, 2], max_tokens=20, repetition_detection=rule)
    ended = []
    for token in (1, 2, 1, 2, 1, 2):
        assert not ended
        rig.plan()
        ended = [end.reason for end in rig.finish(token).finished]
    assert ended == ["repetition"]


def test_a_loop_before_min_tokens_goes_on():
    """STOP-1, fourth"""
    rule = detection(1, 1, 2)
    assert end_of([7, 7], repetition_detection=rule, min_tokens=3) is None
    assert end_of([7, 7, 7], repetition_detection=rule, min_tokens=3) == (REPETITION, None)


@pytest.mark.parametrize("steps_before", [0, 1, 6])
@pytest.mark.parametrize("place", [0, NUM_STOP_IDS - 1, NUM_STOP_IDS, NUM_STOP_IDS + 3])
def test_every_stop_id_ends_a_sequence_however_many_there_are(make_rig, place, steps_before):
    """STOP-1: on the step that computed the prompt, and deep in the steady state."""
    rig = make_rig(num_blocks=40)
    stop_ids = [100 + i for i in range(NUM_STOP_IDS + 4)]
    rig.add([1, 2, 3], stop_token_ids=stop_ids)
    rig.add([1, 2, 3])
    for _ in range(steps_before):
        rig.step(7)
    rig.plan()
    [end] = rig.finish({1: stop_ids[place], 2: 7}).finished
    assert (end.request_id, end.reason, end.stop_reason) == (1, "stop", stop_ids[place])


@pytest.mark.parametrize("steps_before", [0, 1, 6])
def test_eos_ends_a_sequence_at_any_time(make_rig, steps_before):
    """STOP-1"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3], eos=9)
    rig.add([1, 2, 3], eos=9, ignore_eos=True)
    for _ in range(steps_before):
        rig.step(7)
    rig.plan()
    output = rig.finish(9)
    assert [(end.request_id, end.reason, end.stop_reason) for end in output.finished] == [
        (1, "stop", None)
    ]
    assert sorted(output.request_ids.tolist()) == [1, 2], "the token that ended it is told"


@given(
    outputs=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    eos=st.integers(-1, 2),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, 2), max_size=2),
    max_tokens=st.integers(1, 12),
    min_tokens=st.integers(0, 12),
    rule=st.none() | st.tuples(st.integers(1, 3), st.just(0), st.integers(2, 4)),
)
def test_an_ending_is_what_the_rules_say_read_aloud(
    outputs, eos, ignore_eos, stop_token_ids, max_tokens, min_tokens, rule
):
    """STOP-1, STOP-5, against a second implementation"""
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
        repetition_detection=None if rule is None else detection(*rule),
    )
    request = Request(id=1, prompt_token_ids=np.arange(3), params=params, eos_token_id=eos)
    end = why_ended(request, np.array(outputs, np.int32), min(3 + max_tokens, 13))
    assert end == expected_end(request, outputs, 13)
