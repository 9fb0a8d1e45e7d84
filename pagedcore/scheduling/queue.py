"""The sequences that wait, in the order of the policy."""

import heapq
from collections.abc import Iterable

from pagedcore.scheduling.sequence import SequenceState


class WaitingQueue:
    """A heap of sequences; leaving from the middle costs nothing."""

    def __init__(self) -> None:
        self._heap: list[SequenceState] = []
        self._gone: set[SequenceState] = set()  # left, but still in the heap
        self.num_tokens = 0
        """Prompt tokens of all that wait."""

    def __len__(self) -> int:
        return len(self._heap) - len(self._gone)

    def push(self, sequence: SequenceState) -> None:
        """Enter at the place that the policy and the arrival give."""
        self.num_tokens += len(sequence.request.prompt_token_ids)
        heapq.heappush(self._heap, sequence)

    def pop(self) -> SequenceState | None:
        """Take the first; None when nobody waits."""
        while self._heap:
            sequence = heapq.heappop(self._heap)
            if sequence in self._gone:
                self._gone.remove(sequence)
                continue
            self._leave(sequence)
            return sequence
        return None

    def remove(self, sequence: SequenceState) -> None:
        """Leave from wherever it is."""
        self._leave(sequence)
        self._gone.add(sequence)

    def put_back(self, sequences: Iterable[SequenceState]) -> None:
        """Enter again, in the old places (semantics SCHED-5)."""
        for sequence in sequences:
            self.push(sequence)

    def _leave(self, sequence: SequenceState) -> None:
        self.num_tokens -= len(sequence.request.prompt_token_ids)
