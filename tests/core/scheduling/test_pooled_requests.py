"""Requests for a vector: scheduled like prompts, ended with them, and without a token."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.errors import RequestError
from pagedcore.pooling import PoolingParams
from pagedcore.request import FinishReason


def add(rig, prompt, pooling="mean", **options):
    request = rig.request(prompt, **options)
    request.pooling = PoolingParams(pooling=pooling, normalize=True)
    rig.scheduler.add(request)
    return request.id


def vectors_of(rig):
    """What an executor would give to each sequence that draws; here its own id."""
    ids, draws = rig.in_flight[0].request_ids, rig.in_flight[0].samples
    return {int(i): np.array([ids[i]], np.float32) for i in np.flatnonzero(draws)}


def test_a_vector_ends_its_request_and_is_no_token(make_rig):
    rig = make_rig(num_blocks=40, budget=8)
    wanted = add(rig, range(5))
    assert rig.plan() == {wanted: 5}
    output = rig.finish(vectors=vectors_of(rig))
    assert {i: v.tolist() for i, v in output.vectors.items()} == {wanted: [wanted]}
    assert len(output.tokens) == len(output.request_ids) == 0
    assert [(end.request_id, end.reason) for end in output.finished] == [(1, FinishReason.STOP)]
    assert output.num_cached_tokens == {wanted: 0}
    assert not rig.scheduler.has_work
    assert rig.stats["generation_tokens"] == 0
    assert rig.stats["prompt_tokens"] == 5


def test_vectors_and_tokens_share_steps_and_budget(make_rig):
    rig = make_rig(num_blocks=40, budget=8)
    talk = rig.add(range(3))
    wanted = add(rig, range(20, 32))
    assert rig.step() == {talk: 3, wanted: 5}
    assert rig.plan() == {talk: 1, wanted: 7}
    last = vectors_of(rig)
    output = rig.finish(tokens={talk: 9}, vectors={1: last[1]})
    assert output.request_ids.tolist() == [talk]
    assert output.tokens.tolist() == [9]
    assert list(output.vectors) == [wanted]
    assert rig.step() == {talk: 1}


@pytest.mark.parametrize(("pooling", "cached"), [("last", 8), ("mean", 0), ("cls", 0)])
def test_a_cached_prefix_is_taken_only_where_no_position_in_it_is_looked_at(
    make_rig, pooling, cached
):
    """KV-10; whoever computes a prompt leaves it for others."""
    rig = make_rig(num_blocks=40, budget=16)
    add(rig, range(10), pooling="mean")
    rig.plan()
    rig.finish(vectors=vectors_of(rig))
    wanted = add(rig, range(10), pooling=pooling)
    assert rig.plan() == {wanted: 10 - cached}
    assert rig.finish(vectors=vectors_of(rig)).num_cached_tokens == {wanted: cached}


def test_a_prompt_may_be_as_long_as_the_model_and_fill_the_pool(make_rig):
    rig = make_rig(num_blocks=5, block_size=2, max_model_len=8, budget=16, caching=False)
    with pytest.raises(RequestError, match="at most 7 tokens"):
        rig.add(range(8))
    with pytest.raises(RequestError, match="at most 8 tokens"):
        add(rig, range(9))
    wanted = add(rig, range(8))
    assert rig.plan() == {wanted: 8}
    rig.finish(vectors=vectors_of(rig))
    assert len(rig.free) == 4


def test_steps_in_flight_do_not_run_a_pooled_prompt_twice(make_rig):
    """ASYNC-2"""
    rig = make_rig(num_blocks=40, budget=8)
    talk = rig.add(range(3))
    wanted = add(rig, range(20, 24))
    assert rig.plan() == {talk: 3, wanted: 4}
    assert rig.plan() == {talk: 1}
    rig.finish(vectors={1: vectors_of(rig)[1]})
    assert rig.plan() == {talk: 1}
    assert wanted not in rig.running


def test_a_preempted_request_begins_again_and_late_vectors_are_taken(make_rig):
    """PRE-1, ASYNC-5"""
    rig = make_rig(
        num_blocks=8, block_size=2, budget=16, caching=False, scheduler_reserve_full_isl=False
    )
    talk = rig.add(range(6), max_tokens=30)
    rig.step()
    wanted = add(rig, range(20, 26))
    assert rig.plan() == {talk: 1, wanted: 6}
    late = vectors_of(rig)[1]
    rig.scheduler._roster.preempt(rig.sequence(wanted).row)
    output = rig.finish(vectors={1: late})
    assert list(output.vectors) == [wanted]
    assert [end.request_id for end in output.finished] == [wanted]


def test_a_vector_that_failed_ends_its_request_alone(make_rig):
    rig = make_rig(num_blocks=40, budget=16)
    good, bad = add(rig, range(5)), add(rig, range(20, 25))
    rig.plan()
    output = rig.finish(vectors=vectors_of(rig), failed={1: "NaN"})
    assert list(output.vectors) == [good]
    ends = {end.request_id: (end.reason, end.message) for end in output.finished}
    assert ends == {bad: (FinishReason.ERROR, "NaN"), good: (FinishReason.STOP, None)}


def test_a_request_for_a_vector_has_no_other_choices(make_rig):
    rig = make_rig(num_blocks=40)
    request = rig.request(range(4))
    request.pooling = PoolingParams(pooling="last", normalize=True)
    with pytest.raises(RequestError, match="one choice"):
        rig.scheduler.add(request, [rig.request(range(4))])
    rig.scheduler.add(request)
    with pytest.raises(RequestError, match="cannot be forked"):
        rig.fork(request.id)


def test_without_a_cache_any_number_of_prompts_runs_at_once(make_rig):
    """A model that keeps nothing of the past has no groups, and needs no blocks."""
    rig = make_rig(
        num_blocks=2, windows=(), budget=64, max_model_len=16, caching=False,
        enable_chunked_prefill=False,
    )  # fmt: skip
    ids = [add(rig, range(16)) for _ in range(5)]
    assert rig.plan() == dict.fromkeys(ids[:4], 16)
    rig.finish(vectors=vectors_of(rig))
    assert rig.plan() == {ids[4]: 16}
    assert len(rig.finish(vectors=vectors_of(rig)).vectors) == 1
    assert not rig.scheduler.has_work


class Device:
    """Which positions each row has run since it began, as an executor that sums them up would."""

    def __init__(self):
        self.requests = {}
        self.positions = {}

    def run(self, plan):
        """The vectors of a step: how many positions went into each."""
        for admission in plan.admitted:
            self.requests[admission.row] = admission.request
            self.positions[admission.row] = []
        vectors = {}
        for i, row in enumerate(plan.rows.tolist()):
            start, count = int(plan.num_computed[i]), int(plan.num_scheduled[i])
            self.positions[row] += range(start, start + count)
            request = self.requests[row]
            if request.pooling is not None and plan.samples[i]:
                length = len(request.prompt_token_ids)
                if request.pooling.needs_all:
                    assert self.positions[row] == list(range(length))
                vectors[i] = np.array([length], np.float32)
        return vectors


wishes = st.tuples(st.integers(1, 14), st.sampled_from([None, "last", "mean"]), st.booleans())


@given(st.lists(wishes, min_size=1, max_size=10), st.integers(5, 12), st.integers(1, 2))
@settings(max_examples=150, deadline=None)
def test_whatever_runs_beside_it_each_request_gets_its_one_vector(
    make_rig, wishes, num_blocks, depth
):
    """KV-10, PRE-1, SCHED-12: with few blocks, so that some are preempted and begin again."""
    rig = make_rig(
        num_blocks=num_blocks, block_size=4, budget=5, max_model_len=16, max_num_seqs=4,
        scheduler_reserve_full_isl=False,
    )  # fmt: skip
    device, results, got = Device(), deque(), {}
    wanted = {}
    for length, pooling, shares in wishes:
        prompt = [1 if shares else rig.num_requests + 2] * length
        if pooling is None:
            rig.add(prompt, max_tokens=5)
        else:
            wanted[add(rig, prompt, pooling)] = length
    for _ in range(400):
        launched = bool(rig.plan())
        if launched:
            results.append(device.run(rig.last))
        if results and (len(results) == depth or not launched):
            output = rig.finish(vectors=results.popleft())
            assert not set(output.request_ids.tolist()) & wanted.keys()
            for request_id, vector in output.vectors.items():
                assert request_id not in got
                got[request_id] = int(vector[0])
        if not results and not rig.scheduler.has_work:
            break
    assert got == wanted
    assert len(rig.free) == num_blocks - 1
