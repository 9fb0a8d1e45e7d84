"""What front ends count: numbers in memory that processes share, so that any of them can tell all.

Several API servers of one engine are forks of one process. Made there, `Counters` is memory that
all of them see: each counts in a slot of its own, and any of them adds the slots up (METRIC-2).
"""

import mmap
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TOKENS = tuple(step * 10**power for power in range(9) for step in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class Histogram:
    """One histogram of METRIC-5."""

    name: str
    help: str
    bounds: tuple[float, ...]
    """Upper bounds, without +Inf."""

    is_tokens: bool = False
    """Whether bounds above the model's length are left out when it is shown."""


HISTOGRAMS = (
    Histogram("e2e_request_latency_seconds", "From arrival to the last token.", (*_LATENCY, 7680)),
    Histogram("request_queue_time_seconds", "Until first scheduled.", (*_LATENCY, 7680)),
    Histogram(
        "request_inference_time_seconds", "First scheduled to last token.", (*_LATENCY, 7680)
    ),
    Histogram("request_prefill_time_seconds", "First scheduled to first token.", (*_LATENCY, 7680)),
    Histogram("request_decode_time_seconds", "From first to last token.", (*_LATENCY, 7680)),
    Histogram(
        "time_to_first_token_seconds",
        "From arrival to the first token.",
        (*_FIRST_TOKEN, 10, 20, 40, 80, 160, 640, 2560),
    ),
    Histogram("inter_token_latency_seconds", "Between two tokens.", (*_PER_TOKEN, 20, 40, 80)),
    Histogram(
        "request_time_per_output_token_seconds",
        "Mean time between a sequence's tokens.",
        (*_PER_TOKEN, 20, 40, 80),
    ),
    Histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS, True),
    Histogram("request_generation_tokens", "Tokens of an output.", _TOKENS, True),
    Histogram(
        "request_max_num_generation_tokens", "Tokens of a prompt's longest output.", _TOKENS, True
    ),
    Histogram("request_params_max_tokens", "What requests set max_tokens to.", _TOKENS, True),
    Histogram(
        "request_prefill_kv_computed_tokens", "Prompt tokens not found cached.", _TOKENS, True
    ),
    Histogram("request_params_n", "What requests set n to.", (1, 2, 5, 10, 20)),
)

PROBE_COUNTERS = ("probe_prompt_tokens", "probe_generation_tokens", "probe_ends")
"""Raised by each /health_generate, which an engine takes for a request (LIFE-2)."""

EXTRA = ("stop_strings", *PROBE_COUNTERS)
"""What corrects an engine's own counters: it also takes an end by a stop string for an abort."""

OPEN = "open"
"""Set to 1 by each front end that takes requests, when it begins to."""

REFUSALS = ("draining", "not_ready", "tenant_limit")
"""Why a front end refuses requests by itself (QUEUE-3)."""


def _layout() -> tuple[dict[str, int], int]:
    """Where each name's numbers begin, and how many there are in all."""
    sizes = {h.name: len(h.bounds) + 2 for h in HISTOGRAMS}
    sizes |= dict.fromkeys((*EXTRA, *REFUSALS, OPEN), 1)
    ends = list(accumulate(sizes.values()))
    return dict(zip(sizes, [0, *ends], strict=False)), ends[-1]


_START, _WIDTH = _layout()
_BOUNDS = {h.name: h.bounds for h in HISTOGRAMS}


class Counters:
    """The numbers of all front ends of one engine."""

    def __init__(self, num_slots: int = 1) -> None:
        """Make them in the process that forks the front ends; a single one needs no fork."""
        self._num_slots = num_slots
        self._numbers = memoryview(mmap.mmap(-1, 8 * _WIDTH * num_slots)).cast("d")

    def slot(self, index: int = 0) -> "Slot":
        """What one front end counts in."""
        begin = _WIDTH * index
        return Slot(self._numbers[begin : begin + _WIDTH])

    @property
    def all_open(self) -> bool:
        """Whether every front end has begun to take requests: they may share a port."""
        return self.value(OPEN) >= self._num_slots

    def value(self, name: str) -> float:
        """A counter's sum over all front ends."""
        return self._sum(_START[name])

    def histograms(self) -> Iterator[tuple[Histogram, list[float], float]]:
        """Each histogram with its counts per bucket, +Inf last, and the sum of what it observed."""
        for histogram in HISTOGRAMS:
            start, num = _START[histogram.name], len(histogram.bounds) + 1
            counts = [self._sum(start + i) for i in range(num)]
            yield histogram, counts, self._sum(start + num)

    def _sum(self, index: int) -> float:
        return sum(self._numbers[index + _WIDTH * slot] for slot in range(self._num_slots))


class Slot:
    """The numbers of one front end; for its event loop's thread only."""

    __slots__ = ("_numbers",)

    def __init__(self, numbers: "memoryview[float]") -> None:
        self._numbers = numbers

    def add(self, name: str, amount: float = 1) -> None:
        """Raise a counter."""
        self._numbers[_START[name]] += amount

    def observe(self, name: str, value: float) -> None:
        """Count a value in its bucket."""
        bounds, start = _BOUNDS[name], _START[name]
        self._numbers[start + bisect_left(bounds, value)] += 1
        self._numbers[start + len(bounds) + 1] += value
