"""What a server was doing at each moment of a benchmark, as its clients saw it."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pagedcore.cli.bench.client import Outcome

Line = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Seconds since the first request was sent, and what holds from then on."""


def running_requests(done: Sequence[Outcome]) -> Line:
    """Requests that were sent and not finished; `done` are those that were answered."""
    started = np.array([outcome.started for outcome in done])
    moments = np.concatenate((started, started + [outcome.latency for outcome in done]))
    changes = np.repeat([1.0, -1.0], len(done))
    order = np.lexsort((changes, moments))  # one that ends makes room for one that starts
    return moments[order] - started.min(), np.cumsum(changes[order])


def token_rates(done: Sequence[Outcome], bin_s: float = 1.0) -> Line:
    """Tokens per second, in bins of `bin_s` seconds. The end of the last bin repeats its value.

    A piece of text counts as the mean number of tokens of its answer's pieces.
    """
    start = min(outcome.started for outcome in done)
    moments = [_moments(outcome) - start for outcome in done]
    weights = [np.full(len(m), o.num_output / len(m)) for m, o in zip(moments, done, strict=True)]
    places = np.concatenate(moments) / bin_s
    last = max(math.ceil(places.max()) - 1, 0)  # the bin that holds its end, too
    counts = np.bincount(np.minimum(places.astype(np.int64), last), np.concatenate(weights))
    return np.arange(len(counts) + 1) * bin_s, np.append(counts, counts[-1]) / bin_s


def _moments(outcome: Outcome) -> NDArray[np.float64]:
    """When each piece of text came."""
    return outcome.started + outcome.time_to_first + np.cumsum([0.0, *outcome.intervals])
