"""Which prompts find which blocks."""

import numpy as np
import pytest


def hits(rig, request_id):
    return rig.sequence(request_id).request.num_cached_tokens


def finish_alone(rig, prompt, **options):
    """Run a request to its end; its blocks stay in the cache."""
    request_id = rig.add(prompt, **options)
    rig.run()
    return request_id


def test_only_full_blocks_are_hashed(make_rig):
    """KV-1"""
    rig = make_rig(block_size=4, num_blocks=9)
    rig.add([1, 2, 3, 4, 5, 6])
    rig.step()
    assert [key is not None for key in rig.pool.key_of] == [False, True] + [False] * 7


def test_a_key_is_the_hash_and_the_groups_number_in_four_bytes(make_rig):
    """KV-6"""
    rig = make_rig(num_blocks=9, windows=(None, 8))
    rig.add([1, 2, 3])
    rig.step()
    [block_hash] = rig.sequence(1).hashes
    keys = [key for key in rig.pool.key_of if key is not None]
    assert keys == [block_hash + b"\0\0\0\0", block_hash + b"\0\0\0\1"]


def test_hashes_grow_over_the_output_as_blocks_fill(make_rig):
    """KV-7"""
    rig = make_rig(num_blocks=9)
    rig.add([1, 2, 3])
    rig.step(8)
    rig.step(9)  # writes 8, which fills the second block
    rig.step(9)
    assert len(rig.sequence(1).hashes) == 2
    rig.abort(1)
    rig.add([1, 2, 3, 8, 5])
    rig.step()
    assert hits(rig, 2) == 4


def test_a_changed_token_changes_its_block_and_all_later_ones(make_rig):
    """KV-5"""
    rig = make_rig(num_blocks=20, budget=16)
    rig.add([1, 2, 3, 4, 5, 6])
    rig.add([1, 2, 9, 4, 5, 6])
    rig.step()
    one, other = rig.sequence(1).hashes, rig.sequence(2).hashes
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, False]


@pytest.mark.parametrize(
    ("first", "second", "cached"),
    [
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 9], 4),
        ([1, 2, 3, 4, 5], [9, 2, 3, 4, 5], 0),  # equal second blocks after different first ones
        ([1, 2, 3, 4, 5], [1, 2, 9, 4, 5], 2),
    ],
)
def test_a_prefix_is_shared_up_to_the_first_difference(make_rig, first, second, cached):
    """KV-5"""
    rig = make_rig(num_blocks=9)
    finish_alone(rig, first, max_tokens=1)
    request_id = rig.add(second)
    rig.step()
    assert hits(rig, request_id) == cached


@pytest.mark.parametrize(("one", "other", "cached"), [
    (None, None, 4), ("a", "a", 4), ("a", "b", 0), ("a", None, 0), (None, "a", 0),
])  # fmt: skip
def test_only_the_same_salt_shares(make_rig, one, other, cached):
    """KV-3, KV-5"""
    rig = make_rig(num_blocks=9)
    finish_alone(rig, [1, 2, 3, 4, 5], salt=one, max_tokens=1)
    request_id = rig.add([1, 2, 3, 4, 5], salt=other)
    rig.step()
    assert hits(rig, request_id) == cached


def test_running_sequences_keep_equal_blocks_of_their_own(make_rig):
    """KV-8: without a look-up, both compute; the entry made first is found."""
    rig = make_rig(num_blocks=9, budget=16)
    rig.add([1, 2, 3])
    rig.add([1, 2, 3], skip_reading_prefix_cache=True)
    rig.step()
    assert rig.blocks(1)[0] != rig.blocks(2)[0]
    third = rig.add([1, 2, 5])
    rig.step()
    assert rig.blocks(third)[0] == rig.blocks(1)[0]


@pytest.mark.parametrize(("length", "cached", "computed"), [(32, 16, 16), (33, 32, 1)])
def test_at_least_one_token_is_computed(make_rig, length, cached, computed):
    """KV-9, the examples"""
    rig = make_rig(num_blocks=9, block_size=16, budget=64)
    finish_alone(rig, range(32), max_tokens=1)
    request_id = rig.add(range(length))
    assert rig.step() == {request_id: computed}
    assert hits(rig, request_id) == cached


@pytest.mark.parametrize("option", [{"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}])
def test_some_requests_fill_the_cache_and_do_not_read_it(make_rig, option):
    """KV-10"""
    rig = make_rig(num_blocks=9)
    finish_alone(rig, [1, 2, 3, 4, 5], max_tokens=1, **option)
    second = rig.add([1, 2, 3, 4, 5], max_tokens=1, **option)
    assert rig.step() == {second: 5}
    third = rig.add([1, 2, 3, 4, 5], max_tokens=1)
    assert rig.step() == {third: 1}


def test_a_sequence_may_hit_what_another_writes_in_the_same_step(make_rig):
    """KV-11"""
    rig = make_rig(num_blocks=9, budget=16)
    rig.add([1, 2, 3, 4, 5])
    rig.add([1, 2, 3, 4, 6])
    assert rig.plan() == {1: 5, 2: 1}
    assert rig.blocks(2)[:2] == rig.blocks(1)[:2]


def test_blocks_enter_only_as_far_as_the_step_writes(make_rig):
    """KV-11"""
    rig = make_rig(num_blocks=9, budget=5)
    rig.add(range(8))
    rig.plan()
    assert sum(key is not None for key in rig.pool.key_of) == 2


def test_queries_and_hits_count_when_a_sequence_is_first_admitted(make_rig):
    """KV-12"""
    rig = make_rig(num_blocks=9)
    finish_alone(rig, [1, 2, 3, 4, 5], max_tokens=1)
    assert rig.stats["prefix_cache_queries"] == 5
    assert rig.stats["prefix_cache_hits"] == 0
    rig.add([1, 2, 3, 4, 6, 7])
    rig.step()
    assert rig.stats["prefix_cache_queries"] == 11
    assert rig.stats["prefix_cache_hits"] == 4
    rig.scheduler._roster.preempt(rig.sequence(2).row)
    rig.step()
    assert rig.stats["prefix_cache_queries"] == 11, "a resumed sequence is not counted"


def test_a_look_up_without_blocks_is_not_counted(make_rig):
    """KV-12"""
    rig = make_rig(num_blocks=5)
    rig.add([1, 2, 3, 4, 5, 6])
    rig.add([9, 8, 7, 6])
    rig.step()
    assert rig.running == [1]
    assert rig.stats["prefix_cache_queries"] == 6


def test_scored_prompts_and_a_cache_that_is_off_are_not_counted(make_rig):
    """KV-12"""
    for rig, option in ((make_rig(), {"prompt_logprobs": 0}), (make_rig(caching=False), {})):
        rig.add([1, 2, 3], **option)
        rig.step()
        assert rig.stats["prefix_cache_queries"] == 0


def collide(rig):
    hasher = rig.scheduler._cache._hasher
    hasher._digest = lambda data: b"1"
    hasher.is_cryptographic = False


def test_a_collision_is_a_miss(make_rig):
    """KV-13: every block has one hash here."""
    rig = make_rig(num_blocks=20, budget=16)
    collide(rig)
    finish_alone(rig, [1, 2, 3, 4, 5], max_tokens=1)
    other = rig.add([9, 9, 3, 4, 5])
    rig.step()
    assert hits(rig, other) == 0


@pytest.mark.parametrize("option", ["salt", "tokens"])
def test_a_hit_compares_the_whole_chain_where_hashes_may_collide(make_rig, option):
    """KV-13: the second block's own tokens are equal, what is in front of it is not."""
    rig = make_rig(num_blocks=20, budget=16)
    collide(rig)
    finish_alone(rig, [1, 2, 3, 4, 5], max_tokens=1)
    prompt = [1, 2, 3, 4, 5] if option == "salt" else [8, 8, 3, 4, 5]
    other = rig.add(prompt, salt="a" if option == "salt" else None)
    rig.step()
    assert hits(rig, other) == 0


def test_equal_content_is_found_though_hashes_are_not_trusted(make_rig):
    """KV-13"""
    rig = make_rig(num_blocks=20, algorithm="xxhash", budget=16)
    finish_alone(rig, [1, 2, 3, 4, 5, 6, 7], max_tokens=1)
    again = rig.add([1, 2, 3, 4, 5, 6, 9])
    rig.step()
    assert hits(rig, again) == 6


def test_reset_needs_an_idle_pool(make_rig):
    """POOL-7"""
    rig = make_rig(num_blocks=9)
    rig.add([1, 2, 3], max_tokens=1)
    rig.plan()
    assert not rig.scheduler.reset_prefix_cache()
    rig.finish()
    assert rig.scheduler.reset_prefix_cache()
    again = rig.add([1, 2, 3])
    rig.step()
    assert hits(rig, again) == 0


def test_cached_tokens_are_told_once_with_the_first_token(make_rig):
    """USAGE-3"""
    rig = make_rig(num_blocks=12, budget=2, max_num_seqs=2)
    finish_alone(rig, [1, 2, 3, 4, 5], max_tokens=1)
    request_id = rig.add([1, 2, 3, 4, 5, 6, 7], max_tokens=3)
    told = []
    while rig.scheduler.has_work:
        rig.plan()
        told.append(rig.finish().num_cached_tokens)
    assert told == [{}, {request_id: 4}, {}, {}]


def test_eviction_takes_the_oldest_ended_sequences_tail_first(make_rig):
    """POOL-6, POOL-9: the example, from the prompt that is cached to the entry that goes."""
    rig = make_rig(num_blocks=5)
    finish_alone(rig, [1, 2, 3, 4], max_tokens=1)
    assert rig.free == [3, 4, 2, 1]
    request_id = rig.add([1, 2, 9])
    rig.step()
    assert hits(rig, request_id) == 2
    assert rig.blocks(request_id) == [1, 3]
    assert rig.free == [4, 2]
    assert rig.pool.key_of[2] is not None
    assert rig.pool.take(2) == [4, 2]
    assert rig.pool.key_of[2] is None


def test_a_windows_hit_is_contiguous_from_the_right(make_rig):
    """SLOT-6: a hole in what is cached ends the hit, and blocks left of it are not needed."""
    rig = make_rig(num_blocks=20, windows=(5,), budget=32)
    rig.add(np.arange(9))
    rig.step()
    held = rig.blocks(1)
    rig.abort(1)
    rig.pool.forget(held[2])  # blocks 0, 1 and 3 are left: two in a row are needed
    second = rig.add(np.arange(9))
    rig.step()
    assert hits(rig, second) == 4
    assert rig.blocks(second)[:2] == held[:2]


def test_a_windows_hit_leaves_null_blocks_in_front(make_rig):
    """SLOT-6"""
    rig = make_rig(num_blocks=20, windows=(4,), budget=32)
    rig.add(np.arange(9))
    rig.step()
    held = rig.blocks(1)
    rig.abort(1)
    for block in held[:2]:
        rig.pool.forget(block)
    second = rig.add(np.arange(9))
    rig.step()
    assert hits(rig, second) == 8
    assert rig.blocks(second)[:4] == [0, 0, *held[2:4]]


def test_groups_agree_on_the_longest_prefix_that_all_have(make_rig):
    """SLOT-6"""
    rig = make_rig(num_blocks=30, windows=(None, 4), budget=32)
    rig.add(np.arange(9))
    rig.step()
    full, window = rig.blocks(1, 0), rig.blocks(1, 1)
    rig.abort(1)
    rig.pool.forget(full[2])
    second = rig.add(np.arange(9))
    rig.step()
    assert hits(rig, second) == 4
    assert rig.blocks(second, 0)[:2] == full[:2]
    assert rig.blocks(second, 1)[:2] == window[:2]
