"""The pool of cache blocks: who owns each, which are free, and which hold a known prefix.

Blocks are numbers; memory is the executor's. Block 0 is the *null block*: it fills table entries
that are not needed, and is never allocated, freed, hashed or written (semantics POOL-1).
"""

from collections.abc import Iterable

from pagedcore.errors import ConfigError

NULL_BLOCK = 0


class OutOfBlocksError(Exception):
    """Internal: fewer blocks are free than were asked for. Nothing has changed."""


class BlockPool:
    """Reference counts, a free list in order of eviction, and a map from hash to block.

    A free block with a hash still holds its content: it is found by `find` until it is taken. The
    free list is doubly linked through two arrays; the null block is its sentinel, so the head is
    `_next[0]` and the tail `_previous[0]`.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ConfigError(f"a pool needs at least 2 blocks, not {num_blocks}")
        self.num_blocks = num_blocks
        """The null block included."""
        self.num_free = num_blocks - 1
        self.refs = [0] * num_blocks
        """Tables that hold each block; not kept for the null block."""
        self.key_of: list[bytes | None] = [None] * num_blocks
        """The key under which each block stands in the map."""
        self._next = [*range(1, num_blocks), 0]
        self._previous = [num_blocks - 1, *range(num_blocks - 1)]
        self._first: dict[bytes, int] = {}
        self._others: dict[bytes, list[int]] = {}  # entered later under the same key (KV-8)

    @property
    def usage(self) -> float:
        """Share of blocks in use, in 0..1 (POOL-1)."""
        return 1.0 - self.num_free / (self.num_blocks - 1)

    def take(self, count: int) -> list[int]:
        """Take blocks from the head of the free list; each gets one reference (POOL-2, POOL-3).

        Raises OutOfBlocksError, changing nothing, when there are fewer.
        """
        if count > self.num_free:
            raise OutOfBlocksError
        taken = []
        block = self._next[0]
        for _ in range(count):
            taken.append(block)
            if self.key_of[block] is not None:
                self.forget(block)
            self.refs[block] = 1
            block = self._next[block]
        self._next[0] = block
        self._previous[block] = 0
        self.num_free -= count
        return taken

    def touch(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that were found or are shared (POOL-4)."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if self.refs[block] == 0:
                before, after = self._previous[block], self._next[block]
                self._next[before], self._previous[after] = after, before
                self.num_free -= 1
            self.refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a reference from each, in this order (POOL-5).

        One that nobody holds any more goes to the tail of the free list when it has a hash, and to
        the head when its content is of no use.
        """
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            assert self.refs[block] > 0, f"block {block} is released more often than it was taken"
            self.refs[block] -= 1
            if self.refs[block] == 0:
                before = 0 if self.key_of[block] is None else self._previous[0]
                after = self._next[before]
                self._next[before] = self._previous[after] = block
                self._previous[block], self._next[block] = before, after
                self.num_free += 1

    def find(self, key: bytes) -> int | None:
        """The block that entered the map first under this key."""
        return self._first.get(key)

    def enter(self, key: bytes, block: int) -> None:
        """Put a full block into the map; equal ones stay beside each other (KV-8)."""
        assert block != NULL_BLOCK
        assert self.key_of[block] is None, f"block {block} has a hash already"
        self.key_of[block] = key
        if self._first.setdefault(key, block) != block:
            self._others.setdefault(key, []).append(block)

    def forget(self, block: int) -> None:
        """Take a block out of the map; its place in the free list stays."""
        key = self.key_of[block]
        if key is None:
            return
        self.key_of[block] = None
        others = self._others.get(key, [])
        if self._first[key] == block:
            if others:
                self._first[key] = others.pop(0)
            else:
                del self._first[key]
        else:
            others.remove(block)
        if not others:
            self._others.pop(key, None)

    def reset(self) -> bool:
        """Forget every hash; False, changing nothing, while a block is in use (POOL-7)."""
        if self.num_free != self.num_blocks - 1:
            return False
        self.key_of = [None] * self.num_blocks
        self._first.clear()
        self._others.clear()
        return True

    def free_blocks(self) -> list[int]:
        """The free list, head first; for tests and diagnosis."""
        blocks: list[int] = []
        block = self._next[0]
        while block != 0:
            assert len(blocks) < self.num_blocks, "the free list has a cycle"
            blocks.append(block)
            block = self._next[block]
        return blocks
