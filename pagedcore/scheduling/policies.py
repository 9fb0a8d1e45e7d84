"""In which order requests are served, and which of the running gives its blocks back."""

from collections.abc import Sequence
from typing import Any, Protocol

from pagedcore.request import Request


class Policy(Protocol):
    """Decides about whole requests; it never sees tokens or blocks.

    One that also has a method `ended(request)` is told of each request that it was asked about,
    when that is over for whatever reason and its outputs are known.
    """

    def order(self, request: Request) -> Any:
        """The place in the queue: a value that sorts, lower first; ties go by arrival.

        Asked when the request arrives and when it is preempted, so it may depend on both.
        """
        ...

    def victim(self, running: Sequence[Request]) -> int:
        """Which of `running`, not empty and in order of admission, gives its blocks back."""
        ...


class FirstComeFirstServed:
    """The default: by arrival; the youngest yields."""

    def order(self, request: Request) -> int:
        """All alike, so ties by arrival decide."""
        return 0

    def victim(self, running: Sequence[Request]) -> int:
        """The last that was admitted."""
        return len(running) - 1


class Priority:
    """By the request's priority, lower first; the largest (priority, arrival time) yields."""

    def order(self, request: Request) -> tuple[int, float]:
        """Priority, then arrival."""
        return request.priority, request.arrival_time

    def victim(self, running: Sequence[Request]) -> int:
        """Of several alike, the one admitted last."""
        ranks = [(r.priority, r.arrival_time, i) for i, r in enumerate(running)]
        return max(ranks)[2]
