"""The prefix cache: which blocks a prompt finds, and which blocks others may find.

K rows    B block size    G cache groups
"""

from collections.abc import Iterable, Sequence

import numpy as np

from pagedcore.request import Request
from pagedcore.scheduling.blocks import NULL_BLOCK, BlockPool
from pagedcore.scheduling.hashing import BlockHasher, Extra
from pagedcore.scheduling.sequence import BlockContent, SequenceState
from pagedcore.scheduling.table import SequenceTable
from pagedcore.step import Int32

Prefix = list[list[int]]
"""Cached blocks that a prompt begins with: for each group, equally many."""

BlockLog = list[tuple[SequenceState, int, bytes | None]]
"""Who put which block into the map under which key, or (None) found it there; in order."""


class PrefixCache:
    """Looks prefixes up, and enters full blocks. `hasher` is None when it is off."""

    def __init__(
        self,
        pool: BlockPool,
        table: SequenceTable,
        windows: Sequence[int | None],
        block_size: int,
        hasher: BlockHasher | None,
    ) -> None:
        self._pool = pool
        self._table = table
        self._windows = windows
        self._suffixes = [group.to_bytes(4, "big") for group in range(len(windows))]
        self._block_size = block_size
        self._hasher = hasher
        self._content_of: dict[int, BlockContent] = {}  # by block; for hashes that may collide
        self._log: BlockLog = []

    # Look-up

    def reads(self, sequence: SequenceState) -> bool:
        """Whether it may begin with cached blocks (KV-10); a child's prompt is not scored."""
        params, pooling = sequence.request.params, sequence.request.pooling
        if pooling is not None and pooling.needs_all:
            return False
        scores = params.prompt_logprobs is not None and not sequence.is_child
        return self._hasher is not None and not scores and not params.skip_reading_prefix_cache

    def find(self, sequence: SequenceState, tokens: Int32) -> Prefix:
        """The longest cached prefix of `tokens` that all groups have (KV-9, SLOT-6)."""
        limit = (len(tokens) - 1) // self._block_size
        if limit == 0 or not self.reads(sequence):
            return [[] for _ in self._windows]
        self._extend_hashes(sequence, tokens, limit)
        length = limit
        while True:  # a group that finds less makes the others look again
            found = [self._find_in(group, sequence, length) for group in range(len(self._windows))]
            shortest = min(map(len, found))
            if all(len(blocks) == shortest for blocks in found):
                return found
            length = shortest

    def _find_in(self, group: int, sequence: SequenceState, limit: int) -> list[int]:
        hashes, suffix = sequence.hashes, self._suffixes[group]
        window = self._windows[group]
        if window is None:
            blocks = []
            for index in range(limit):
                block = self._find(hashes[index] + suffix, sequence, index)
                if block is None:
                    break
                blocks.append(block)
            return blocks
        needed = -(-(window - 1) // self._block_size)
        run: list[int] = []  # contiguous blocks from `index` on, last first
        for index in range(limit - 1, -1, -1):
            block = self._find(hashes[index] + suffix, sequence, index)
            if block is None:
                run = []
                continue
            run.append(block)
            if len(run) >= needed or index == 0:
                return [NULL_BLOCK] * index + run[::-1]
        return []

    def _find(self, key: bytes, sequence: SequenceState, index: int) -> int | None:
        block = self._pool.find(key)
        if block is None or not sequence.contents:
            return block
        stored, own = self._content_of[block], sequence.contents[index]
        if index > 0:
            own.before = sequence.contents[index - 1]
        if not stored.equals(own):
            return None  # another content with the same hash (KV-13)
        sequence.contents[index] = stored  # the next comparison ends where they meet
        return block

    def note_found(self, sequence: SequenceState, prefix: Prefix) -> None:
        """Remember who built on which blocks, until their steps have succeeded."""
        self._log += [(sequence, block, None) for blocks in prefix for block in blocks]

    # Entries

    def enter(self, rows: Int32, num_tokens: Int32) -> None:
        """Put the full blocks within the first `num_tokens` [K] of rows [K] into the map (KV-11).

        The tokens are known, and their keys and values written or about to be.
        """
        if self._hasher is None:
            return
        full, entered = num_tokens // self._block_size, self._table.num_hashed[rows]
        due = np.flatnonzero(full > entered)
        if len(due) == 0:
            return
        if len(due) > 1 and (full[due] - entered[due] == 1).all():
            self.enter_next(rows[due])
            return
        for i in due.tolist():
            self._enter_row(int(rows[i]), int(full[i]))

    def enter_next(self, rows: Int32) -> None:
        """Put the next block of each of rows [K] into the map."""
        if self._hasher is None:
            return
        table, size = self._table, self._block_size
        index = table.num_hashed[rows]
        sequences = table.sequences(rows)
        lengths = [len(sequence.hashes) for sequence in sequences]
        if lengths != index.tolist() or not all(lengths) or not self._hasher.is_cryptographic:
            for row, end in zip(rows.tolist(), (index + 1).tolist(), strict=True):
                self._enter_row(row, end)
            return
        tokens = table.tokens[rows[:, None], (index * size)[:, None] + np.arange(size)]
        hashes = self._hasher.hash_many([s.hashes[-1] for s in sequences], tokens)
        for sequence, block_hash in zip(sequences, hashes, strict=True):
            sequence.hashes.append(block_hash)
        table.num_hashed[rows] = index + 1
        for group, suffix in enumerate(self._suffixes):
            blocks = table.block_tables[group, rows, index].tolist()
            keys = [block_hash + suffix for block_hash in hashes]
            self._put(sequences, blocks, keys)

    def _enter_row(self, row: int, end: int) -> None:
        table = self._table
        start = int(table.num_hashed[row])
        sequence = table.sequence(row)
        self._extend_hashes(sequence, table.tokens[row], end)
        table.num_hashed[row] = end
        for group, suffix in enumerate(self._suffixes):
            blocks = table.block_tables[group, row, start:end].tolist()
            keys = [block_hash + suffix for block_hash in sequence.hashes[start:end]]
            for block, content in zip(blocks, sequence.contents[start:end], strict=False):
                if self._pool.key_of[block] is None:
                    self._content_of[block] = content  # for hashes that may collide
            self._put([sequence] * len(blocks), blocks, keys)

    def _put(
        self, sequences: Sequence[SequenceState], blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        key_of, enter, log = self._pool.key_of, self._pool.enter, self._log
        for sequence, block, key in zip(sequences, blocks, keys, strict=True):
            if block != NULL_BLOCK and key_of[block] is None:
                enter(key, block)
                log.append((sequence, block, key))

    def _extend_hashes(self, sequence: SequenceState, tokens: Int32, num_blocks: int) -> None:
        assert self._hasher is not None
        hashes, size = sequence.hashes, self._block_size
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else self._hasher.first_parent
            extra = _extra(sequence.request) if index == 0 else None
            block = tokens[index * size : (index + 1) * size]
            hashes.append(self._hasher.hash(parent, block, extra))
            if not self._hasher.is_cryptographic:
                before = sequence.contents[-1] if sequence.contents else None
                sequence.contents.append(BlockContent(before, block.tobytes(), extra))

    def enter_settled(self, row: int) -> None:
        """Put what is left of a row's full blocks into the map, before it leaves: what the steps
        behind its last known token have written. These have succeeded, so nobody need remember.
        """
        table, rows = self._table, np.array([row], np.int32)
        log, self._log = self._log, []
        self.enter(rows, np.minimum(table.num_computed[rows], table.num_known[rows] - 1))
        self._log = log

    def forget(self, entries: Iterable[tuple[int, bytes]]) -> None:
        """Take blocks out of the map again, where they still stand under these keys (KV-11)."""
        for block, key in entries:
            if self._pool.key_of[block] == key:
                self._pool.forget(block)

    def reset(self) -> bool:
        """Forget every prefix; False, changing nothing, while blocks are in use (POOL-7)."""
        if not self._pool.reset():
            return False
        self._content_of.clear()
        return True

    def take_log(self) -> BlockLog:
        """What happened to the map since the last call."""
        log, self._log = self._log, []
        return log


def _extra(request: Request) -> Extra:
    """What block 0 holds beside tokens; later blocks follow from it (KV-3).

    An adapter stands for its content, so that another one of the same name finds nothing of it.
    """
    adapter = (("lora", request.adapter_key),) if request.adapter_key else ()
    salt = () if request.cache_salt is None else (request.cache_salt,)
    return (*adapter, *salt) or None
