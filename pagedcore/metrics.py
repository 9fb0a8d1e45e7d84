"""Sizes that an engine counts in buckets, for histograms (semantics METRIC-5)."""

from bisect import bisect_left

STEP_TOKENS = "iteration_tokens_total"
PREEMPTIONS = "request_num_preemptions"

ENGINE_BOUNDS: dict[str, tuple[int, ...]] = {
    STEP_TOKENS: (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    PREEMPTIONS: (0, 1, 2, 5, 10, 20),
}
"""Upper bounds, without +Inf, of the histograms that only an engine can fill."""


class Buckets:
    """How many values fell between one bound and the next; the last bucket has no bound."""

    def __init__(self, name: str) -> None:
        """`name` is one of `ENGINE_BOUNDS`."""
        self._name = name
        self._bounds = ENGINE_BOUNDS[name]
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0

    def observe(self, value: int) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def stats(self) -> dict[str, float]:
        """The counts and the sum, by name and number of the bucket."""
        counts = {bucket_name(self._name, i): n for i, n in enumerate(self._counts)}
        return {**counts, sum_name(self._name): self._sum}


def bucket_name(name: str, number: int) -> str:
    """What an engine's stats call the count of a bucket."""
    return f"{name}:{number}"


def sum_name(name: str) -> str:
    """What they call the sum of all values."""
    return f"{name}:sum"
