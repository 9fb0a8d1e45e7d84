"""Block tables: where a sequence's tokens go, copies on write, and what a window leaves behind.

Between the pool, which knows blocks and no sequences, and the scheduler, which knows sequences and
no blocks. Every operation is for all cache groups: each group has a table of its own per sequence,
from the one pool.
"""

from collections.abc import Sequence

import numpy as np

from pagedcore.cache_spec import CacheGroup
from pagedcore.scheduling.blocks import NULL_BLOCK, BlockPool
from pagedcore.scheduling.prefix_cache import Prefix
from pagedcore.scheduling.table import SequenceTable
from pagedcore.step import Int32


class Pager:
    """Hands blocks to rows of the table."""

    def __init__(
        self,
        pool: BlockPool,
        table: SequenceTable,
        groups: Sequence[CacheGroup],
        block_size: int,
    ) -> None:
        self._pool = pool
        self._table = table
        self._windows = [group.spec.window for group in groups]
        self.slides = any(window is not None for window in self._windows)
        """Whether a window leaves blocks behind."""
        self._groups = range(len(groups))
        self._block_size = block_size
        self._updates: list[Int32] = []
        self._copies: dict[int, list[tuple[int, int, int, int]]] = {}  # by row that writes
        self._outdated: list[int] = []  # sources of copies: released when the step is planned
        self._repeats = False
        self.num_copies = 0
        """Blocks copied on write so far."""

    # Needs

    def num_unused(self, prefix: Prefix) -> int:
        """Blocks of a prefix that are on the free list: taking them uses free blocks up."""
        refs = self._pool.refs
        return sum(b != NULL_BLOCK and refs[b] == 0 for blocks in prefix for b in blocks)

    def prefix_length(self, prefix: Prefix) -> int:
        """Positions that a prefix holds."""
        return len(prefix[0]) * self._block_size if prefix else 0

    def num_needed(self, length: int, num_scheduled: int, prefix: Prefix | None = None) -> int:
        """Blocks that a sequence of `length` tokens holds at most at a time, in all groups,
        beside those that it has found.
        """
        total = -(-length // self._block_size)
        needed = 0
        for group, window in enumerate(self._windows):
            most = total
            if window is not None:
                most = min(total, -(-(window - 1 + num_scheduled) // self._block_size) + 1)
            found = sum(map(bool, prefix[group])) if prefix is not None else 0
            needed += most - found
        return needed

    # Tables

    def adopt(self, row: int, prefix: Prefix) -> None:
        """Begin a row's tables with a cached prefix."""
        table = self._table
        length = len(prefix[0]) if prefix else 0
        for group, blocks in enumerate(prefix):
            self._pool.touch(blocks)
            self._write(group, row, 0, blocks)
            table.num_blocks[group, row] = length
            table.num_slid[group, row] = blocks.count(NULL_BLOCK)
        table.num_hashed[row] = length
        table.num_computed[row] = length * self._block_size

    def can_share(self, parent: int, num_computed: int) -> bool:
        """Whether the parent still has all that a query at `num_computed` looks back on."""
        for group, window in enumerate(self._windows):
            if window is not None:
                first = max(0, num_computed - window + 1) // self._block_size
                if self._table.num_slid[group, parent] > first:
                    return False
        return True

    def share(self, parent: int, child: int, num_computed: int) -> None:
        """Let a fork's child go on from its parent's first `num_computed` positions (FORK-3)."""
        table = self._table
        length = -(-num_computed // self._block_size)
        for group in self._groups:
            blocks = table.block_tables[group, parent, :length].tolist()
            self._pool.touch(blocks)
            self._write(group, child, 0, blocks)
            table.num_blocks[group, child] = length
            table.num_slid[group, child] = table.num_slid[group, parent]
        full = num_computed // self._block_size
        table.sequence(child).hashes = table.sequence(parent).hashes[:full]
        table.sequence(child).contents = table.sequence(parent).contents[:full]
        table.num_hashed[child] = min(full, int(table.num_hashed[parent]))
        table.num_computed[child] = num_computed
        table.is_forked[parent] = table.is_forked[child] = True
        self._repeats = True

    def slide(self, rows: Int32) -> None:
        """Free what every later query of these rows is too far away to see (SLOT-6)."""
        if not self.slides:
            return
        table = self._table
        for group, window in enumerate(self._windows):
            if window is None:
                continue
            behind = (table.num_computed[rows] - window + 1) // self._block_size
            behind = np.minimum(behind, table.num_blocks[group, rows])
            for i in np.flatnonzero(behind > table.num_slid[group, rows]).tolist():
                row, start, end = int(rows[i]), int(table.num_slid[group, rows[i]]), int(behind[i])
                left = table.block_tables[group, row, start:end].tolist()
                self._release(left)
                table.block_tables[group, row, start:end] = NULL_BLOCK
                table.num_slid[group, row] = end

    def reserve(self, rows: Int32, counts: Int32) -> bool:
        """Give each row the slots for its next `counts` tokens; False, changing nothing, if some
        cannot be had (SLOT-1, SLOT-2). Writers of shared blocks get copies (FORK-4).
        """
        table, pool = self._table, self._pool
        written = table.num_computed[rows] + counts
        needed = -(-written // self._block_size) - table.num_blocks[:, rows]  # [G, S]
        np.maximum(needed, 0, out=needed)
        forked = rows[table.is_forked[rows]]
        total = int(needed.sum())
        if total == 0 and len(forked) == 0:
            return True
        if total + self._num_copies(forked) > pool.num_free:
            return False
        for row in forked.tolist():
            self._own_tail(row)
        for group in self._groups:
            self._append(group, rows, needed[group])
        return True

    def grow(self, rows: Int32) -> bool:
        """Give each of rows [K] one more block, in every group; False, changing nothing, if they
        cannot be had.
        """
        table, count = self._table, len(rows)
        if count * len(self._groups) > self._pool.num_free:
            return False
        for group in self._groups if count else ():
            index = table.num_blocks[group, rows]
            updates = np.empty((count, 4), np.int32)
            updates[:, 0], updates[:, 1], updates[:, 2] = group, rows, index
            updates[:, 3] = taken = self._pool.take(count)
            table.block_tables[group, rows, index] = taken
            table.num_blocks[group, rows] = index + 1
            self._updates.append(updates)
        return True

    def _append(self, group: int, rows: Int32, needed: Int32) -> None:
        """Take new blocks for the rows that need some, in their order."""
        table = self._table
        growing = np.flatnonzero(needed)
        if len(growing) == 0:
            return
        taking, counts = rows[growing], needed[growing]
        total = int(counts.sum())
        starts = table.num_blocks[group, taking]
        index = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(total)
        updates = np.empty((total, 4), np.int32)
        updates[:, 0] = group
        updates[:, 1] = np.repeat(taking, counts)
        updates[:, 2] = index
        updates[:, 3] = self._pool.take(total)
        table.block_tables[group, updates[:, 1], updates[:, 2]] = updates[:, 3]
        table.num_blocks[group, taking] = starts + counts
        self._updates.append(updates)

    def _write(self, group: int, row: int, start: int, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        table = self._table
        table.block_tables[group, row, start : start + len(blocks)] = blocks
        updates = np.empty((len(blocks), 4), np.int32)
        updates[:, 0], updates[:, 1], updates[:, 3] = group, row, blocks
        updates[:, 2] = np.arange(start, start + len(blocks))
        self._updates.append(updates)

    # Copy on write

    def _shared_tail(self, group: int, row: int) -> int | None:
        """The block that a row is about to write and may not, or None."""
        table, pool = self._table, self._pool
        index = int(table.num_computed[row]) // self._block_size
        if index >= table.num_blocks[group, row]:
            return None
        block = int(table.block_tables[group, row, index])
        is_owned = pool.refs[block] == 1 and pool.key_of[block] is None
        return None if block == NULL_BLOCK or is_owned else block

    def _num_copies(self, forked: Int32) -> int:
        """Blocks that copies need: one per writer, but none for the last owner of a tail."""
        pool = self._pool
        writers: dict[int, int] = {}
        for row in forked.tolist():
            for group in self._groups:
                block = self._shared_tail(group, row)
                if block is not None:
                    writers[block] = writers.get(block, 0) + 1
        return sum(
            min(count, pool.refs[block] - (pool.key_of[block] is None))
            for block, count in writers.items()
        )

    def _own_tail(self, row: int) -> None:
        table, pool = self._table, self._pool
        index, offset = divmod(int(table.num_computed[row]), self._block_size)
        for group in self._groups:
            block = self._shared_tail(group, row)
            if block is None:
                continue
            [fresh] = pool.take(1)
            self.num_copies += 1
            self._copies.setdefault(row, []).append((group, block, fresh, offset))
            if pool.refs[block] > 1:
                pool.release([block])
            else:  # nothing may overwrite it before the copies of this step are made
                self._outdated.append(block)
            self._write(group, row, index, [fresh])
            self._repeats = True
        table.is_forked[row] = False

    # The end of a step, and of a row

    def free(self, row: int) -> None:
        """Give a row's blocks back, last first (POOL-5); copies planned for it are withdrawn."""
        self._repeats = self._repeats or bool(self._updates)
        withdrawn = self._copies.pop(row, [])
        self.num_copies -= len(withdrawn)
        for _, source, _, _ in withdrawn:
            if source in self._outdated:
                self._outdated.remove(source)
                self._release([source])
        for group in self._groups:
            self._release(self._blocks_of(group, row))

    def _release(self, blocks: Sequence[int]) -> None:
        """Drop references, last first; what a copy of this step still reads is not given away."""
        if not self._copies:
            self._pool.release(reversed(blocks))
            return
        sources = {copy[1] for copies in self._copies.values() for copy in copies}
        for block in reversed(blocks):
            if block in sources and self._pool.refs[block] == 1:
                self._outdated.append(block)
            else:
                self._pool.release([block])

    def take_changes(self) -> tuple[Int32, Int32]:
        """Table updates [N, 4] and copies [C, 4] since the last call, as in `StepPlan`."""
        if not self._updates and not self._copies and not self._outdated:
            return _EMPTY, _EMPTY
        updates = np.concatenate(self._updates) if self._updates else _EMPTY
        if self._repeats and len(updates):  # the last write of an entry counts
            _, last = np.unique(updates[::-1, :3], axis=0, return_index=True)
            updates = updates[len(updates) - 1 - np.sort(last)]
        self._updates, self._repeats = [], False
        copies = [copy for each in self._copies.values() for copy in each]
        self._copies = {}
        self._pool.release(self._outdated)
        self._outdated = []
        return updates, np.array(copies, np.int32) if copies else _EMPTY

    def _blocks_of(self, group: int, row: int) -> list[int]:
        table = self._table
        start, end = int(table.num_slid[group, row]), int(table.num_blocks[group, row])
        blocks: list[int] = table.block_tables[group, row, start:end].tolist()
        return blocks


_EMPTY: Int32 = np.empty((0, 4), np.int32)
