"""The policy `fair`: owners share by tokens, whoever asks most."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedcore.builtin import pagedcore_policies
from pagedcore.request import Request, SamplingParams
from pagedcore.scheduling.fairness import FairShare


@pytest.fixture
def rig(make_rig):
    return make_rig(num_blocks=200, max_num_seqs=1, policy=FairShare())


def order_of_starts(rig):
    """Owners and ids, in the order in which their requests were run."""
    started = []
    while rig.scheduler.has_work:
        for request_id in rig.step():
            if request_id not in started:
                started.append(request_id)
    return started


def test_it_is_offered_by_its_name():
    assert pagedcore_policies()["fair"] is FairShare


def test_a_flood_of_one_owner_delays_another_by_no_more_than_what_runs(rig):  # R17
    flood = [rig.add([1, 2, 3], owner="a", max_tokens=4) for _ in range(20)]
    rig.step()
    late = rig.add([4, 5, 6], owner="b", max_tokens=4)
    assert order_of_starts(rig)[:3] == [flood[0], late, flood[1]]


def test_owners_take_turns_and_each_keeps_its_order(rig):
    first = [rig.add([1, 2], owner="a", max_tokens=3) for _ in range(4)]
    second = [rig.add([3, 4], owner="b", max_tokens=3) for _ in range(4)]
    turns = order_of_starts(rig)
    assert [i for i in turns if i in first] == first
    assert [i for i in turns if i in second] == second
    assert turns == [i for pair in zip(first, second, strict=True) for i in pair]


def test_shares_are_counted_in_tokens_and_not_in_requests(rig):
    long = [rig.add([1, 2], owner="a", max_tokens=10) for _ in range(4)]
    short = [rig.add([3, 4], owner="b", max_tokens=2) for _ in range(12)]
    three = [short[i : i + 3] for i in range(0, 12, 3)]
    expected = [[one, *some] for one, some in zip(long, three, strict=True)]
    assert order_of_starts(rig) == [i for turn in expected for i in turn]


def test_what_was_not_produced_is_not_charged(rig):
    """Whoever allows much and takes little is not behind the others for that."""
    first = rig.add([1, 2], owner="a", max_tokens=40, eos=7)
    other = [rig.add([3, 4], owner="b", max_tokens=3) for _ in range(2)]
    while rig.sequence(first):
        rig.step()
    again = rig.add([5, 6], owner="a", max_tokens=3)
    assert order_of_starts(rig) == [other[0], again, other[1]]


def test_who_stays_away_saves_nothing_up(rig):
    for _ in range(5):
        rig.add([1, 2, 3], owner="a", max_tokens=5)
    rig.run()
    a, b = ([rig.add([1, 2], owner=owner, max_tokens=3) for _ in range(3)] for owner in "ab")
    assert order_of_starts(rig) == [i for pair in zip(a, b, strict=True) for i in pair]


def test_without_owners_the_first_is_served_first(rig):
    ids = [rig.add([1, 2], max_tokens=2) for _ in range(5)]
    assert order_of_starts(rig) == ids


def test_the_owner_that_has_most_yields(make_rig):
    rig = make_rig(num_blocks=7, max_model_len=12, budget=16, policy=FairShare())
    small = rig.add([1, 2, 3], owner="b", max_tokens=5)
    many = [rig.add([4, 5, 6], owner="a", max_tokens=8) for _ in range(2)]
    rig.step()
    while rig.status(many[1]) == "RUNNING":
        rig.step()
    assert rig.status(many[1]) == "PREEMPTED"
    assert rig.sequence(small) is None or rig.status(small) == "RUNNING"
    assert set(rig.run().values()) == {"length"}


def test_choices_belong_to_who_asked(make_rig):
    rig = make_rig(num_blocks=60, max_num_seqs=8, policy=FairShare())
    first = rig.add([1, 2, 3], choices=3, owner="a", max_tokens=4)
    rig.step()
    (child,) = rig.fork(first, max_tokens=8)
    assert rig.sequence(child).request.owner == "a"
    rig.abort(first)
    rig.run()


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.integers(1, 30), st.booleans()),
        max_size=60,
    )
)
def test_nothing_is_remembered_of_requests_that_are_over(steps):
    policy, live = FairShare(), []
    for number, (owner, num_prompt, most, ends) in enumerate(steps):
        request = Request(
            id=number,
            prompt_token_ids=np.zeros(num_prompt, np.int32),
            params=SamplingParams(max_tokens=most),
            owner=owner,
        )
        place = policy.order(request)
        assert policy.order(request) == place, "preempted, it keeps its place"
        live.append(request)
        assert 0 <= policy.victim(live) < len(live)
        if ends:
            done = live.pop(0)
            done.output_token_ids = [0] * done.params.max_tokens
            policy.ended(done)
    for request in live:
        policy.ended(request)
    assert not policy._places
    assert all(abs(a.promised) < 1e-6 and not a.num_live for a in policy._accounts.values())
