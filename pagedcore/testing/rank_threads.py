"""Ranks that are threads of one process: a model that is divided runs without a second device."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from pagedcore.execution.shard import Shard

TIMEOUT_S = 120.0
"""How long a rank waits for the others: far longer than any of them takes."""

T = TypeVar("T")


def run_ranks(size: int, work: Callable[[Shard], T], *, timeout_s: float = TIMEOUT_S) -> list[T]:
    """What `work` returns for each of `size` ranks, which run at once.

    If one raises, the others do not wait for it, and its error is raised here. A rank that asks for
    more of the others than they for it ends with threading.BrokenBarrierError.
    """
    meeting = _Meeting(size, timeout_s)

    def run(rank: int) -> T:
        try:
            return work(Shard(rank, size, _Threads(rank, meeting)))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size, "rank") as pool:
        jobs = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for job in jobs if (error := job.exception()) is not None]
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return [job.result() for job in jobs]


class _Meeting:
    """Where ranks hand each other tensors."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.barrier = threading.Barrier(size, timeout=timeout_s)
        self._given: list[Tensor | None] = [None] * size

    def combine(
        self, rank: int, x: Tensor, combine: Callable[[Sequence[Tensor]], Tensor]
    ) -> Tensor:
        """What becomes of all ranks' x; nobody's is overwritten before all have read it."""
        self._given[rank] = x
        self.barrier.wait()
        out = combine([given for given in self._given if given is not None])
        self.barrier.wait()
        return out


class _Threads:
    """A `Collective` of threads."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self._rank = rank
        self._meeting = meeting

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collective.all_reduce`."""
        return self._meeting.combine(self._rank, x, lambda given: torch.stack(list(given)).sum(0))

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """See `Collective.all_gather`."""
        return self._meeting.combine(self._rank, x, lambda given: torch.cat(list(given), dim))
