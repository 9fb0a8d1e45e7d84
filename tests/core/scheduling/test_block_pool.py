"""The pool by itself: who owns a block, and which one goes next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedcore.errors import ConfigError
from pagedcore.scheduling.blocks import NULL_BLOCK, BlockPool, OutOfBlocksError


def test_the_null_block_is_never_given_away_nor_counted():
    """POOL-1"""
    pool = BlockPool(5)
    assert pool.take(4) == [1, 2, 3, 4]
    pool.touch([NULL_BLOCK])
    pool.release([NULL_BLOCK])
    assert pool.refs[NULL_BLOCK] == 0
    assert pool.free_blocks() == []
    assert pool.usage == 1.0


def test_usage_is_the_share_of_blocks_in_use():
    """POOL-1"""
    pool = BlockPool(5)
    assert pool.usage == 0.0
    pool.take(1)
    assert pool.usage == 0.25


def test_a_pool_without_a_usable_block_is_refused():
    with pytest.raises(ConfigError, match="at least 2 blocks, not 1"):
        BlockPool(1)


def test_allocation_takes_the_head_in_order_of_id():
    """POOL-2"""
    pool = BlockPool(6)
    assert pool.free_blocks() == [1, 2, 3, 4, 5]
    assert pool.take(2) == [1, 2]
    assert pool.free_blocks() == [3, 4, 5]


def test_taking_more_than_is_free_changes_nothing():
    """SLOT-2"""
    pool = BlockPool(4)
    pool.take(1)
    with pytest.raises(OutOfBlocksError):
        pool.take(3)
    assert pool.free_blocks() == [2, 3]
    assert pool.num_free == 2


def test_taking_a_cached_block_removes_its_entry():
    """POOL-3"""
    pool = BlockPool(3)
    [first, _] = pool.take(2)
    pool.enter(b"a", first)
    pool.release([first])
    assert pool.find(b"a") == first
    assert pool.take(1) == [first]
    assert pool.find(b"a") is None
    assert pool.refs[first] == 1


def test_a_hit_leaves_the_free_list_and_gets_an_owner():
    """POOL-4"""
    pool = BlockPool(4)
    [block] = pool.take(1)
    pool.enter(b"a", block)
    pool.release([block])
    pool.touch([block])
    pool.touch([block])
    assert pool.refs[block] == 2
    assert pool.free_blocks() == [2, 3]


def test_blocks_without_a_hash_come_back_in_their_old_order():
    """POOL-5, the example"""
    pool = BlockPool(6)
    blocks = pool.take(3)
    pool.release(reversed(blocks))
    assert pool.free_blocks() == [1, 2, 3, 4, 5]


def test_cached_blocks_go_last_and_a_tail_goes_before_its_front():
    """POOL-5, POOL-6"""
    pool = BlockPool(6)
    old, new = pool.take(2), pool.take(2)
    for block in (*old, *new):
        pool.enter(b"%d" % block, block)
    pool.release(reversed(old))
    pool.release(reversed(new))
    assert pool.free_blocks() == [5, 2, 1, 4, 3]


def test_reset_forgets_every_hash_and_keeps_the_order():
    """POOL-7"""
    pool = BlockPool(4)
    blocks = pool.take(2)
    for block in blocks:
        pool.enter(b"same", block)
    pool.release(reversed(blocks))
    order = pool.free_blocks()
    assert pool.reset()
    assert pool.free_blocks() == order
    assert pool.find(b"same") is None


def test_reset_is_refused_while_a_block_is_in_use():
    """POOL-7"""
    pool = BlockPool(4)
    [block] = pool.take(1)
    pool.enter(b"a", block)
    assert not pool.reset()
    assert pool.find(b"a") == block


def test_releasing_what_nobody_holds_is_our_own_bug():
    """POOL-8"""
    pool = BlockPool(4)
    [block] = pool.take(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="more often than it was taken"):
        pool.release([block])


def test_equal_blocks_stay_beside_each_other_and_the_first_is_found():
    """KV-8"""
    pool = BlockPool(5)
    first, second, third = pool.take(3)
    for block in (first, second, third):
        pool.enter(b"a", block)
    assert pool.find(b"a") == first
    pool.forget(second)
    assert pool.find(b"a") == first
    pool.forget(first)
    assert pool.find(b"a") == third
    pool.forget(third)
    assert pool.find(b"a") is None
    pool.forget(third)  # once more changes nothing


class ListPool:
    """The same rules on a plain list, the slow way."""

    def __init__(self, num_blocks):
        self.free = list(range(1, num_blocks))
        self.refs = [0] * num_blocks
        self.entries = []

    def take(self, count):
        taken, self.free = self.free[:count], self.free[count:]
        for block in taken:
            self.forget(block)
            self.refs[block] = 1
        return taken

    def touch(self, block):
        if self.refs[block] == 0:
            self.free.remove(block)
        self.refs[block] += 1

    def release(self, block):
        self.refs[block] -= 1
        if self.refs[block] == 0:
            hashed = any(entry[1] == block for entry in self.entries)
            self.free.insert(len(self.free) if hashed else 0, block)

    def enter(self, key, block):
        self.entries.append((key, block))

    def forget(self, block):
        self.entries = [entry for entry in self.entries if entry[1] != block]

    def find(self, key):
        return next((block for k, block in self.entries if k == key), None)


OPERATIONS = st.tuples(
    st.sampled_from(["take", "touch", "release", "enter", "forget"]),
    st.integers(0, 9),
    st.sampled_from([b"a", b"b"]),
)


@given(st.lists(OPERATIONS, max_size=60))
def test_the_pool_behaves_as_a_plain_list_would(operations):
    """POOL-2 to POOL-6, KV-8"""
    pool, model = BlockPool(7), ListPool(7)
    for name, number, key in operations:
        block = 1 + number % 6
        if name == "take" and number % 3 <= len(model.free):
            assert pool.take(number % 3) == model.take(number % 3)
        elif name == "touch":
            pool.touch([block])
            model.touch(block)
        elif name == "release" and model.refs[block]:
            pool.release([block])
            model.release(block)
        elif name == "enter" and all(entry[1] != block for entry in model.entries):
            pool.enter(key, block)
            model.enter(key, block)
        elif name == "forget":
            pool.forget(block)
            model.forget(block)
        assert pool.free_blocks() == model.free
        assert pool.num_free == len(model.free)
        assert pool.refs == model.refs
        assert [pool.find(k) for k in (b"a", b"b")] == [model.find(k) for k in (b"a", b"b")]
