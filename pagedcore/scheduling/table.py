"""The running sequences as columns: what changes per token, for all of them at once.

    R rows    G cache groups    M table entries per row    L longest sequence

A row is a sequence's index as long as it runs. The steady state, in which every row advances by one
token, is a handful of vector operations on the columns of `running`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedcore.scheduling.sequence import SequenceState
from pagedcore.step import Int32, Int64

if TYPE_CHECKING:
    from pagedcore.scheduling.steady import SteadyState

NUM_STOP_IDS = 8
"""Stop ids per row that are compared in one vector operation; requests with more are looked at
one by one."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows that run together, and who holds them: the same in every step until somebody moves."""

    rows: Int32
    """[S]"""

    version: int
    """The table's."""

    tickets: Int64
    """[S] Of their stays in the table."""

    request_ids: Int64
    """[S]"""


class SequenceTable:
    """Columns by row. Assigning to a column is the scheduler's and the pager's business."""

    def __init__(
        self, *, num_rows: int, max_model_len: int, num_groups: int, max_blocks: int
    ) -> None:
        def column(fill: int = 0) -> Int32:
            return np.full(num_rows, fill, np.int32)

        self.request_id = np.full(num_rows, -1, np.int64)
        """Who holds the row; -1 when it is free."""
        self.ticket = np.full(num_rows, -1, np.int64)
        """Differs for each stay in the table, so that a late result finds whom it belongs to."""
        self.num_known = column()
        """Tokens that the host knows: prompt and outputs."""
        self.length = column()
        """The same, and those that are still in flight."""
        self.num_computed = column()
        """Positions whose keys and values are written, or will be by steps that are planned."""
        self.num_prompt = column()
        """Prompt tokens."""
        self.end = column()
        """Length at which it ends: by max_tokens, or by the model's limit."""
        self.eos = column(-1)
        """The token that ends it; -1 is none."""
        self.stop_ids = np.full((num_rows, NUM_STOP_IDS), -1, np.int32)
        """[R, 8] More tokens that end it; -1 fills up."""
        self.needs_look = np.zeros(num_rows, np.bool_)
        """Its end cannot be told from the columns alone: see `stopping.py`."""
        self.width = max_model_len + 1
        """L + 1"""
        self.tokens = np.empty((num_rows, self.width), np.int32)
        """[R, L + 1] Known tokens. Untouched memory costs nothing."""
        self.flat_tokens = self.tokens.reshape(-1)
        """[R * (L + 1)] The same memory."""
        self.block_tables = np.zeros((num_groups, num_rows, max_blocks), np.int32)
        """[G, R, M] Blocks of each row."""
        self.num_blocks = np.zeros((num_groups, num_rows), np.int32)
        """[G, R] Entries that are filled."""
        self.num_slid = np.zeros((num_groups, num_rows), np.int32)
        """[G, R] Entries at the front that a window left behind: the null block."""
        self.num_hashed = column()
        """Full blocks that were put into the prefix cache's map."""
        self.is_forked = np.zeros(num_rows, np.bool_)
        """The block it writes next may have other owners (FORK-4)."""
        self.running: Int32 = np.empty(0, np.int32)
        """Rows in order of admission. Replaced, never changed in place: plans hold on to it."""
        self.next_ticket = 0
        """Larger than every ticket given so far."""
        self.version = 0
        """Changes with `running`."""
        self.steady: SteadyState | None = None
        """While all of `running` decode and nobody comes or goes."""
        self._sequences: list[SequenceState | None] = [None] * num_rows
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        """Sequences that may still be added."""
        return len(self._free)

    def sequence(self, row: int) -> SequenceState:
        """Who holds a row."""
        found = self._sequences[row]
        assert found is not None, f"row {row} is free"
        return found

    def sequences(self, rows: Int32) -> list[SequenceState]:
        """Who holds each of `rows`; they are not free."""
        by_row = self._sequences
        return [by_row[row] for row in rows.tolist()]

    def outputs(self, row: int) -> Int32:
        """[K] Known outputs of a row; a view."""
        return self.tokens[row, self.num_prompt[row] : self.num_known[row]]

    def add(self, sequence: SequenceState, tokens: Int32, end: int) -> int:
        """Give a sequence a free row, at the end of `running`.

        What it has of blocks is the last owner's, until the pager fills it in.
        """
        row = self._free.pop()
        request = sequence.request
        self._sequences[row] = sequence
        self.request_id[row] = request.id
        self.ticket[row] = self.next_ticket
        self.next_ticket += 1
        self._changed()
        self.num_known[row] = self.length[row] = len(tokens)
        self.num_prompt[row] = len(request.prompt_token_ids)
        self.tokens[row, : len(tokens)] = tokens
        self.end[row] = end
        params = request.params
        self.eos[row] = -1 if params.ignore_eos else request.eos_token_id
        self.stop_ids[row] = -1
        stop_ids = params.stop_token_ids[:NUM_STOP_IDS]
        self.stop_ids[row, : len(stop_ids)] = stop_ids
        many = len(params.stop_token_ids) > NUM_STOP_IDS
        self.needs_look[row] = many or params.repetition_detection is not None
        self.is_forked[row] = False
        self.running = np.append(self.running, np.int32(row))
        sequence.row = row
        return row

    def remove(self, row: int) -> SequenceState:
        """Free a row; the sequence's outputs are brought up to date."""
        sequence = self.sequence(row)
        sequence.request.output_token_ids = self.outputs(row).tolist()
        self._sequences[row] = None
        self.request_id[row] = self.ticket[row] = -1
        self._changed()
        self.running = self.running[self.running != row]
        self._free.append(row)
        sequence.row = -1
        return sequence

    def _changed(self) -> None:
        self.version += 1
        self.steady = None
