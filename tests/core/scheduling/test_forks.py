"""Copy on write: what children share, who copies, and what becomes of them."""

import pytest

from pagedcore.errors import RequestError
from pagedcore.request import Request, SamplingParams


def copies_of(plan):
    return plan.copies.tolist()


def test_a_prompt_is_computed_once_whatever_n_is(make_rig):
    """FORK-1, FORK-2"""
    rig = make_rig(num_blocks=40, budget=4)
    rig.add(range(7), choices=3)
    assert rig.status(2) == "DEFERRED"
    assert rig.step() == {1: 4}
    assert rig.step() == {1: 3}
    assert rig.step() == {1: 1, 2: 1, 3: 1}


def test_a_fork_takes_effect_when_all_but_the_last_token_is_computed(make_rig):
    """FORK-2: c = 4 here, so one position of the prompt is still to come."""
    rig = make_rig(num_blocks=40, budget=4)
    rig.add(range(5), choices=2)
    assert rig.step() == {1: 4}
    assert rig.step() == {1: 1, 2: 1}


def test_children_share_blocks_and_nothing_is_copied_yet(make_rig):
    """FORK-3"""
    rig = make_rig(num_blocks=40, block_size=4)
    rig.add(range(6), choices=3)
    rig.step()
    free = rig.free
    [child for child, _ in rig.scheduler._roster.join_forks()]
    assert rig.free == free
    assert rig.blocks(1) == rig.blocks(2) == rig.blocks(3)
    assert rig.refs(1) == [3, 3]
    assert rig.computed(2) == 5


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    ("length", "refs", "copies", "blocks"),
    [(40, [4, 4, 4], 3, 2 + 4), (33, [4, 4, 1], 0, 2 + 4), (32, [4, 4], 3, 1 + 4 + 4)],
)
def test_who_shares_and_who_copies(make_rig, length, refs, copies, blocks, caching):
    """FORK-5, FORK-11: the table of examples; 3 children, B = 16."""
    rig = make_rig(num_blocks=40, block_size=16, budget=64, caching=caching)
    rig.add(range(length), choices=4, max_tokens=30)
    rig.step()
    rig.scheduler._roster.join_forks()
    assert rig.refs(1) == refs
    while rig.computed(2) <= 40:
        rig.step({1: 90, 2: 91, 3: 92, 4: 93})
    used = {block for request_id in (1, 2, 3, 4) for block in rig.blocks(request_id)}
    assert rig.stats["cow_block_copies"] == copies
    assert len(used) == blocks


def test_an_owner_copies_its_own_slots_of_the_partial_block(make_rig):
    """FORK-4, FORK-6: c mod B slots for a child; the parent has written more."""
    rig = make_rig(num_blocks=40, block_size=8, budget=64)
    rig.add(range(10))
    rig.step()
    rig.step()
    [child] = rig.fork(1, max_tokens=16)  # c = 11, position 10 is written
    shared = rig.blocks(1)
    rig.plan()
    [[group, source, target, count]] = copies_of(rig.last)
    assert (group, source, count) == (0, shared[1], 3)
    assert rig.blocks(1) == [shared[0], target], "the parent writes first, and copies"
    assert rig.blocks(child) == shared, "the last owner writes in place"
    updates = rig.last.table_updates.tolist()
    assert [0, rig.sequence(1).row, 1, target] in updates


def test_a_cached_tail_is_copied_even_by_its_only_owner(make_rig):
    """FORK-4: the block has a hash, and others may find it."""
    rig = make_rig(num_blocks=40, block_size=4, budget=64)
    rig.add(range(8))
    rig.step()
    [child] = rig.fork(1, max_tokens=16)  # c = 8: nothing partial
    rig.step()
    [second] = rig.fork(1, max_tokens=16)
    rig.abort(child)
    rig.add(range(8), choices=2)  # c = 7: block 1 is full, cached, and partial for the child
    rig.step()
    rig.abort(1, second)
    parent, other = rig.num_requests - 1, rig.num_requests
    assert rig.status(other) == "DEFERRED"
    old = rig.blocks(parent)[1]
    rig.plan()
    copied = [copy for copy in copies_of(rig.last) if copy[1] == old]
    assert [copy[3] for copy in copied] == [3]
    assert rig.blocks(other)[1] == copied[0][2]


def test_without_blocks_a_copy_is_withdrawn_with_its_victim(make_rig):
    """FORK-7: the youngest child yields, and then nobody needs a copy."""
    rig = make_rig(num_blocks=3, block_size=4, budget=16, max_model_len=8)
    rig.add(range(6), choices=2, max_tokens=2)
    rig.step()
    assert rig.plan() == {1: 1}
    assert copies_of(rig.last) == []
    assert rig.status(2) == "PREEMPTED"
    rig.finish()
    assert set(rig.run().values()) == {"length"}
    assert rig.stats["cow_block_copies"] == 0


def test_a_copy_planned_for_a_victim_is_not_done(make_rig):
    """FORK-7: under PRIORITY the victim may already have its copy."""
    rig = make_rig(num_blocks=6, block_size=4, budget=32, priorities=True, max_model_len=16)
    rig.add(range(6), choices=2, priority=9, arrival=1.0)
    rig.step()
    rig.add(range(50, 58), priority=1)
    rig.plan()  # both owners run: one copies
    assert len(copies_of(rig.last)) == 1
    rig.finish()
    before = rig.stats["cow_block_copies"]
    children = rig.fork(1, max_tokens=16)
    rig.plan()
    planned = {copy[2] for copy in copies_of(rig.last)}
    held = {block for i in rig.running for block in rig.blocks(i)}
    assert planned <= held
    assert rig.stats["cow_block_copies"] - before == len(planned)
    assert children
    assert rig.running


def test_children_without_a_row_wait_in_front(make_rig):
    """FORK-8: as ordinary sequences, which find their full blocks again."""
    rig = make_rig(num_blocks=40, max_num_seqs=2)
    rig.add(range(5), choices=4, max_tokens=2)
    rig.add([9, 9], max_tokens=1)
    rig.step()
    assert rig.step() == {1: 1, 2: 1}
    assert [rig.status(i) for i in (3, 4)] == ["WAITING", "WAITING"]
    assert rig.step() == {2: 1, 3: 1}
    assert rig.step() == {3: 1, 4: 1}
    assert rig.stats["prefix_cache_hits"] == 0, "children's look-ups are not counted (KV-12)"
    assert set(rig.run().values()) == {"length"}


def test_a_child_takes_over_what_its_parent_has(make_rig):
    """FORK-9"""
    rig = make_rig(num_blocks=40, priorities=True)
    rig.add([1, 2, 3], salt="s", priority=4, arrival=2.5)
    rig.step(8)
    rig.step(9)
    child = rig.request([0], max_tokens=5)
    rig.scheduler.fork(1, [child])
    assert child.prompt_token_ids.tolist() == [1, 2, 3]
    assert child.output_token_ids == [8, 9]
    assert (child.cache_salt, child.priority, child.arrival_time) == ("s", 4, 2.5)
    rig.plan()
    [admission] = rig.last.admitted
    assert admission.token_ids.tolist() == [1, 2, 3, 8, 9]
    ended = {}
    rig.finish(7)
    while child.id in rig.running:
        rig.plan()
        ended |= {end.request_id: end.reason for end in rig.finish(7).finished}
    assert ended[child.id] == "length"
    assert child.output_token_ids == [8, 9, 7, 7, 7], "inherited outputs count for max_tokens"


@pytest.mark.parametrize(("seed", "seeds"), [(5, [6, 7]), (2**63 - 1, [-(2**63), -(2**63) + 1])])
def test_a_child_that_inherits_its_parameters_has_a_seed_of_its_own(make_rig, seed, seeds):
    """FORK-9: seed + i, as 64 bits"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2, 3], seed=seed)
    parent = rig.sequence(1).request
    children = [Request(id=i, prompt_token_ids=None, params=parent.params) for i in (8, 9)]
    rig.scheduler.fork(1, children)
    assert [child.params.seed for child in children] == seeds
    assert [rig.sequence(i).seed for i in (8, 9)] == seeds


def test_seeds_that_nobody_asked_for_differ_and_can_be_repeated(make_rig):
    """FORK-9, SAMPLE-10"""
    drawn = []
    for _ in range(2):
        rig = make_rig(num_blocks=40)
        rig.add([1, 2, 3], choices=3)
        drawn.append([rig.sequence(i).seed for i in (1, 2, 3)])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 3


@pytest.mark.parametrize("who", [1, 2])
def test_owners_are_independent(make_rig, who):
    """FORK-10: one that ends only drops its references."""
    rig = make_rig(num_blocks=40, block_size=4)
    rig.add(range(6), choices=3)
    rig.step()
    rig.step()
    others = [i for i in (1, 2, 3) if i != who]
    before = {i: rig.blocks(i) for i in others}
    rig.abort(who)
    assert {i: rig.blocks(i) for i in others} == before
    rig.step()
    assert rig.running == others


def test_children_of_a_parent_that_ends_first_become_ordinary(make_rig):
    """FORK-10"""
    rig = make_rig(num_blocks=40, budget=4)
    rig.add(range(9), choices=3)
    rig.step()
    rig.abort(1)
    assert [rig.status(i) for i in (2, 3)] == ["WAITING", "WAITING"]
    assert rig.step() == {2: 4}
    assert set(rig.run().values()) == {"length"}


def test_a_child_of_a_child_waits_for_both(make_rig):
    """FORK-2"""
    rig = make_rig(num_blocks=40)
    rig.add(range(5), choices=2)
    [grandchild] = rig.fork(2, max_tokens=4)
    rig.step()
    assert rig.step() == {1: 1, 2: 1, grandchild: 1}
    assert rig.blocks(grandchild)[:2] == rig.blocks(1)[:2]


def test_nothing_is_left_when_all_owners_have_ended(make_rig):
    """FORK-12"""
    rig = make_rig(num_blocks=40, block_size=4)
    rig.add(range(6), choices=4, max_tokens=5)
    rig.fork(1, 2, max_tokens=3)
    assert set(rig.run().values()) == {"length"}
    assert rig.pool.num_free == 39


def test_a_fork_in_flight_does_not_share_what_a_window_left_behind(make_rig):
    """FORK-3, SLOT-6: c is two positions behind what is planned, and so is its window."""
    rig = make_rig(num_blocks=40, block_size=1, windows=(2,), caching=False)
    rig.add([1, 2, 3])
    rig.step()
    rig.plan()
    rig.plan()
    [child] = rig.fork(1, max_tokens=9)
    rig.finish()
    counts = rig.plan()
    assert child in rig.running
    assert counts[child] > 1, "it computes again instead"


@pytest.mark.parametrize("count", [0, 129])
def test_a_fork_makes_one_to_128_children(make_rig, count):
    """FORK-1: a RequestError is a ValueError"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2])
    with pytest.raises(ValueError, match=r"1\.\.128 children"):
        rig.fork(1, count)


def test_a_fork_of_nobody_is_refused(make_rig):
    """FORK-1"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2], max_tokens=1)
    rig.step()
    for unknown in (1, 77):
        with pytest.raises(RequestError, match=f"no live request has the id {unknown}"):
            rig.fork(unknown)


def test_a_child_must_have_a_token_left_to_produce(make_rig):
    """FORK-9: or it would wait for ever"""
    rig = make_rig(num_blocks=40)
    rig.add([1, 2])
    rig.step()
    rig.step()
    with pytest.raises(RequestError, match="more than the 2 outputs"):
        rig.fork(1, max_tokens=2)
    rig.fork(1, max_tokens=3)
    assert rig.scheduler.num_waiting == 1


def test_choices_have_one_prompt(make_rig):
    rig = make_rig(num_blocks=40)
    with pytest.raises(RequestError, match="one prompt"):
        rig.scheduler.add(rig.request([1, 2]), [rig.request([1, 3])])
    assert not rig.scheduler.has_work


def test_a_childs_prompt_is_not_scored_again(make_rig):
    """FORK-8, KV-10"""
    rig = make_rig(num_blocks=40, max_num_seqs=1)
    rig.add(range(5), choices=2, prompt_logprobs=1, max_tokens=1)
    rig.plan()
    output = rig.finish(prompt_logprobs={0: list("abcd")})
    assert output.prompt_logprobs == {1: list("abcd")}
    assert rig.plan() == {2: 1}
    assert rig.finish(prompt_logprobs={0: []}).prompt_logprobs == {}
    assert SamplingParams().prompt_logprobs is None
