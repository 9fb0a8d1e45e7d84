"""The sequences that wait, in the order of the policy."""

import heapq
from collections.abc import Iterable

from pagedcore.scheduling.sequence import SequenceState


class WaitingQueue:
    """A heap of sequences; leaving from the middle costs little."""

    def __init__(self) -> None:
        self._heap: list[SequenceState] = []
        self._gone: set[SequenceState] = set()  # left, but still in the heap
        self.num_tokens = 0
        """Prompt tokens of all that wait."""

    def __len__(self) -> int:
        return len(self._heap) - len(self._gone)

    def push(self, sequence: SequenceState) -> None:
        """Enter at the place that the policy and the arrival give."""
        self.num_tokens += _num_tokens(sequence)
        heapq.heappush(self._heap, sequence)

    def first(self) -> SequenceState | None:
        """Who is next; None when nobody waits."""
        heap, gone = self._heap, self._gone
        while heap and heap[0] in gone:
            gone.remove(heapq.heappop(heap))
        return heap[0] if heap else None

    def pop(self) -> SequenceState | None:
        """Take the first; None when nobody waits."""
        sequence = self.first()
        if sequence is not None:
            heapq.heappop(self._heap)
            self._leave(sequence)
        return sequence

    def remove(self, sequence: SequenceState) -> None:
        """Leave from wherever it is."""
        self._leave(sequence)
        self._gone.add(sequence)
        if len(self._gone) > len(self._heap) // 2:
            self._heap = [one for one in self._heap if one not in self._gone]
            heapq.heapify(self._heap)
            self._gone.clear()

    def put_back(self, sequences: Iterable[SequenceState]) -> None:
        """Enter again, in the old places (semantics SCHED-5)."""
        for sequence in sequences:
            self.push(sequence)

    def _leave(self, sequence: SequenceState) -> None:
        self.num_tokens -= _num_tokens(sequence)


def _num_tokens(sequence: SequenceState) -> int:
    """A prompt counts once, however many choices it has (QUEUE-1)."""
    return 0 if sequence.is_child else len(sequence.request.prompt_token_ids)
