"""Who may wait, and who may leave."""

import pytest

from pagedcore.errors import OverloadedError, RequestError


def test_a_full_queue_refuses_and_counts(make_rig):
    """QUEUE-1, QUEUE-3"""
    rig = make_rig(num_blocks=40, max_num_queued_reqs=2)
    rig.add([1, 2])
    rig.add([1, 2])
    with pytest.raises(OverloadedError, match="max_num_queued_reqs is 2") as raised:
        rig.add([1, 2])
    assert raised.value.reason == "queued_reqs"
    assert 1 <= raised.value.retry_after_s <= 60
    assert rig.stats["admission_rejections_queued_reqs"] == 1
    rig.step()
    rig.add([1, 2])  # who runs does not wait


def test_all_choices_are_taken_or_none(make_rig):
    """QUEUE-1, EN-8"""
    rig = make_rig(num_blocks=40, max_num_queued_reqs=4)
    rig.add([1, 2])
    with pytest.raises(OverloadedError):
        rig.add([1, 2], choices=4)
    assert rig.scheduler.num_waiting == 1
    rig.add([1, 2], choices=3)
    assert rig.scheduler.num_waiting == 4
    assert rig.stats["num_requests_deferred"] == 2


def test_a_prompts_tokens_count_once_whatever_n_is(make_rig):
    """QUEUE-1"""
    rig = make_rig(num_blocks=40, max_num_queued_tokens=10)
    rig.add(range(6), choices=3)
    rig.add(range(4))
    with pytest.raises(OverloadedError) as raised:
        rig.add([1])
    assert raised.value.reason == "queued_tokens"
    assert rig.stats["admission_rejections_queued_tokens"] == 1


@pytest.mark.parametrize("limit", ["max_num_queued_reqs", "max_num_queued_tokens"])
def test_a_request_that_alone_exceeds_a_limit_is_the_callers_mistake(make_rig, limit):
    """QUEUE-1: 400, naming the limit, however empty the queue is"""
    rig = make_rig(num_blocks=40, **{limit: 3})
    with pytest.raises(RequestError, match=limit):
        rig.add(range(4), choices=4)
    assert not rig.scheduler.has_work


def test_no_limit_is_no_limit(make_rig):
    """QUEUE-2"""
    rig = make_rig(num_blocks=40, max_num_queued_reqs=0)
    for _ in range(100):
        rig.add([1, 2], max_tokens=1)
    assert len(rig.run()) == 100


def waiting(rig):
    return rig.add([1, 2, 3])


def deferred(rig):
    return rig.add(range(9), choices=2) + 1


def mid_prefill(rig):
    request_id = rig.add(range(20, 32))
    rig.step()
    return request_id


def decoding(rig):
    request_id = rig.add([1, 2, 3])
    rig.step()
    rig.step()
    return request_id


def in_flight(rig):
    request_id = rig.add([1, 2, 3])
    rig.plan()
    rig.plan()
    return request_id


def preempted(rig):
    request_id = decoding(rig)
    rig.scheduler._roster.preempt(rig.sequence(request_id).row)
    return request_id


def preempted_in_flight(rig):
    request_id = in_flight(rig)
    rig.scheduler._roster.preempt(rig.sequence(request_id).row)
    return request_id


def parent_of_a_pending_fork(rig):
    return rig.add(range(40, 52), choices=3)


STATES = [
    waiting, deferred, mid_prefill, decoding, in_flight, preempted, preempted_in_flight,
    parent_of_a_pending_fork,
]  # fmt: skip


@pytest.mark.parametrize("reach", STATES)
def test_an_abort_ends_a_request_in_every_state(make_rig, reach):
    """CANCEL-1, EN-3, EN-5"""
    rig = make_rig(num_blocks=60)
    other = rig.add([7, 8, 9], max_tokens=4)
    request_id = reach(rig)
    live = {i for i in range(1, rig.num_requests + 1) if rig.sequence(i)} - {request_id}
    rig.abort(request_id)
    assert rig.sequence(request_id) is None
    assert rig.stats["request_success_abort"] == 1
    held = {block for i in rig.running for block in rig.blocks(i)}
    assert len(held) + rig.pool.num_free == 59, "its references are dropped"
    ended = {}
    while rig.scheduler.has_work or rig.in_flight:
        if not rig.in_flight:
            assert request_id not in rig.plan()
        ended |= {end.request_id: end.reason for end in rig.finish().finished}
    assert set(ended) <= live
    assert ended.get(other, "length") == "length"
    assert rig.pool.num_free == 59


def test_aborting_somebody_unknown_or_ended_does_nothing(make_rig):
    """CANCEL-2, POOL-8"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3])
    rig.step()
    free = rig.free
    rig.abort(1)
    after = rig.free
    rig.abort(1, 1, 99)
    assert rig.free == after != free
    assert rig.stats["request_success_abort"] == 1


def test_choices_are_aborted_together_and_nobody_else(make_rig):
    """CANCEL-3, EN-7"""
    rig = make_rig(num_blocks=60, max_num_seqs=8)
    rig.add(range(5), choices=8)
    other = rig.add([1, 2])
    rig.step()
    rig.step()
    rig.abort(*range(1, 9))
    assert rig.running == [other]
    assert rig.scheduler.num_waiting == 0


def test_the_queue_forgets_those_who_left(make_rig):
    """EN-23: a request that waits for ever does not keep the aborted ones in memory."""
    rig = make_rig(num_blocks=40, max_num_seqs=1)
    rig.add([1, 2])
    rig.step()
    rig.add([9, 9])
    for _ in range(200):
        rig.abort(rig.add([1, 2]))
    assert rig.scheduler.num_waiting == 1
    assert len(rig.scheduler._roster.queue._heap) <= 4


def test_everything_is_zero_when_all_have_ended(make_rig):
    """METRIC-10"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3], choices=3, max_tokens=4)
    rig.abort(rig.add([4, 5]))
    rig.run()
    stats = rig.stats
    assert stats["num_requests_running"] == stats["num_requests_waiting"] == 0
    assert stats["kv_cache_usage_perc"] == 0
    ended = sum(count for name, count in stats.items() if name.startswith("request_success"))
    assert ended == 4
    assert stats["prompt_tokens"] == 3, "once per prompt (METRIC-7); the aborted one never ran"
    assert stats["generation_tokens"] == 12
