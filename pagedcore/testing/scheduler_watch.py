"""Looks over a scheduler's shoulder: what its block pool gives away and takes back, and how."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np

from pagedcore.scheduling.scheduler import Scheduler
from pagedcore.step import Int32
from pagedcore.testing.hash_model import HashModel


class Watch:
    """Poisons blocks of no use, and checks every allocation as it happens.

    A block is poisoned when it is taken, and when it is released without a hash: who reads it all
    the same reads garbage.
    """

    def __init__(self, scheduler: Scheduler, model: HashModel) -> None:
        self.order_is_known = True
        """False from a failed step on: entries that it takes back stay in their places."""
        self._scheduler = scheduler
        self._model = model
        self._released: set[int] = set()
        self._times: dict[int, int] = {}  # by block: when it was last released
        self._num_releases = 0
        pool, pager = scheduler._pool, scheduler._pager
        self._take, self._release = pool.take, pool.release
        self._reserve, self._free = pager.reserve, pager.free
        for owner, name, watched in (
            (pool, "take", self._on_take),
            (pool, "release", self._on_release),
            (pager, "reserve", self._on_reserve),
            (pager, "free", self._on_free),
        ):
            setattr(owner, name, watched)

    def snapshot(self) -> Any:
        """A copy of everything that a refused or failed call must leave as it is."""
        pool, table = self._scheduler._pool, self._scheduler._table
        state = (
            pool.refs,
            pool.key_of,
            pool.free_blocks(),
            pool._first,
            pool._others,
            table.num_blocks.tolist(),
            table.block_tables.tolist(),
            table.is_forked.tolist(),
            sorted(self._scheduler._roster._live),
            self._scheduler.stats(),
        )
        return copy.deepcopy(state)

    def poison_released(self) -> None:
        """Make blocks that were released and not kept unreadable, once no step needs them."""
        pool = self._scheduler._pool
        self._model.poison([b for b in self._released if not pool.refs[b] and not pool.key_of[b]])
        self._released.clear()

    def check_free_order(self) -> None:
        """9: unhashed blocks come first, then the least recently released (POOL-6)."""
        if not self.order_is_known:
            return
        pool = self._scheduler._pool
        free = pool.free_blocks()
        hashed = [pool.key_of[block] is not None for block in free]
        assert hashed == sorted(hashed), "9: a cached block goes before an uncached one"
        times = [self._times[block] for block in free if pool.key_of[block] is not None]
        assert times == sorted(times), "9: the free list is not in order of release"

    def _on_take(self, count: int) -> list[int]:
        blocks = self._take(count)
        self._model.poison(blocks)
        self._released.difference_update(blocks)
        return blocks

    def _on_release(self, blocks: Iterable[int]) -> None:
        listed = list(blocks)
        self._release(listed)
        for block in listed:
            if block != 0 and self._scheduler._pool.refs[block] == 0:
                self._num_releases += 1
                self._times[block] = self._num_releases
                self._released.add(block)

    def _on_free(self, row: int) -> None:
        table = self._scheduler._table
        held = [
            blocks[: table.num_blocks[group, row]].tolist()
            for group, blocks in enumerate(table.block_tables[:, row])
        ]
        self._free(row)
        pool = self._scheduler._pool
        places = {block: place for place, block in enumerate(pool.free_blocks())}
        for blocks in held:
            cached = [places[b] for b in blocks if b in places and pool.key_of[b] is not None]
            ordered = cached == sorted(cached, reverse=True)
            assert ordered, "9: a sequence's front is evicted before its tail"

    def _on_reserve(self, rows: Int32, counts: Int32) -> bool:
        before, free = self.snapshot(), self._scheduler._pool.num_free
        done = self._reserve(rows, counts)
        if not done:
            assert self.snapshot() == before, "10: a failed allocation changed something"
            table, size = self._scheduler._table, self._scheduler._block_size
            needed = -(-(table.num_computed[rows] + counts) // size) - table.num_blocks[:, rows]
            copies = int(table.is_forked[rows].sum()) * len(needed)
            most = int(np.maximum(needed, 0).sum()) + copies
            assert most > free, "10: an allocation failed though there was room"
        return done
