"""The steady state: every running row advances by one token, and nobody comes or goes.

    S running rows    R rows of the table    B block size    K stop ids

Everything that depends on the rows alone is worked out once; a step is then a handful of vector
operations, and only the rows that reach the border of a block are looked at.
"""

import numpy as np

from pagedcore.scheduling.table import Batch, SequenceTable
from pagedcore.step import Bool, Int32, Int64


class SteadyState:
    """Holds as long as the table's rows do not change and every result is for all of them."""

    def __init__(self, table: SequenceTable, batch: Batch, block_size: int) -> None:
        """`batch` has all running rows, each of which has just been planned for one token."""
        rows = batch.rows
        self.batch = batch
        self.ones: Int32 = np.ones(len(rows), np.int32)
        """[S]"""
        self.trues: Bool = np.ones(len(rows), np.bool_)
        """[S]"""
        self.num_left = int((table.end[rows] - table.length[rows]).min())
        """Steps until the first row has all the tokens that it may have (ASYNC-2)."""
        self._table = table
        self._is_running = np.zeros(len(table.num_known), np.int32)  # [R] 1 or 0
        self._is_running[rows] = 1
        self._num_computed = table.num_computed[rows]
        known = table.num_known[rows]
        self._num_until_end = int((table.end[rows] - known).min())
        self._places: Int64 = table.width * rows.astype(np.int64) + known  # [S] of next tokens
        num_stop_ids = int((table.stop_ids[rows] >= 0).sum(axis=1).max())
        stop_ids = table.stop_ids[rows, :num_stop_ids].T
        self._ending = np.concatenate((table.eos[rows][None], stop_ids))  # [1 + K, S]
        self._needs_look = bool(table.needs_look[rows].any())
        self._growing = _by_border(rows, self._num_computed, block_size)
        self._num_planned = 0
        self._filling = _by_border(rows, known, block_size)
        self._num_finished = 0
        self._num_entered = 0

    def growing_rows(self) -> Int32:
        """Rows whose next token begins a block."""
        return self._growing[-self._num_planned % len(self._growing)]

    def advance(self) -> Int32:
        """Plan one token for every row: [S] positions that were computed before."""
        before = self._num_computed
        self._num_computed = before + 1  # a new array: plans hold on to it
        self._num_planned += 1
        self.num_left -= 1
        self._table.num_computed += self._is_running
        return before

    def await_tokens(self) -> None:
        """Every row has one more token in flight."""
        self._table.length += self._is_running

    def filled_rows(self) -> list[Int32]:
        """Rows that have filled a block with known tokens since the last call, by step."""
        size = len(self._filling)
        steps = range(self._num_entered + 1, self._num_finished + 1)
        self._num_entered = self._num_finished
        return [rows for i in steps if len(rows := self._filling[-i % size])]

    def append(self, tokens: Int32) -> bool:
        """Take a token [S] for every row; whether one of them may be its sequence's last."""
        table = self._table
        table.flat_tokens[self._places] = tokens
        self._places += 1
        table.num_known += self._is_running
        self._num_finished += 1
        self._num_until_end -= 1
        if self._num_until_end <= 0 or self._needs_look:
            return True
        return bool((self._ending == tokens).any())


def _by_border(rows: Int32, lengths: Int32, block_size: int) -> list[Int32]:
    """B arrays: at i the rows that stand i positions behind the border of a block."""
    phases = lengths % block_size
    order = np.argsort(phases, kind="stable")
    bounds = np.searchsorted(phases[order], np.arange(1, block_size))
    return np.split(rows[order], bounds)
