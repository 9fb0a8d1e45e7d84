"""When requests are sent: a rate, how even their arrivals are, and how the rate grows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pagedcore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RampUp:
    """A rate that goes from `start` to `end` requests per second, over all requests."""

    strategy: Literal["linear", "exponential"]
    start: float
    end: float

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise ConfigError("ramp_up_start_rps and ramp_up_end_rps must be numbers above 0")

    def rates(self, num_prompts: int) -> NDArray[np.float64]:
        """The rate at each request."""
        progress = np.arange(num_prompts) / num_prompts
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * progress
        rates: NDArray[np.float64] = self.start * (self.end / self.start) ** progress
        return rates


def arrival_times(
    num_prompts: int,
    *,
    request_rate: float,
    burstiness: float,
    seed: int,
    ramp_up: RampUp | None = None,
) -> Sequence[float]:
    """Seconds from the start at which requests are sent.

    Intervals follow a gamma distribution with shape `burstiness` and mean 1 / rate; 1 is a Poisson
    process, below is burstier, above more even. They are scaled so that the last request comes
    when it should: at num_prompts / request_rate. An infinite rate sends all at once. `ramp_up`
    gives each request a rate of its own, in place of `request_rate`.
    """
    if not request_rate > 0:
        raise ConfigError(f"request_rate must be above 0, not {request_rate}")
    if not burstiness > 0:
        raise ConfigError(f"burstiness must be above 0, not {burstiness}")
    if ramp_up is None and math.isinf(request_rate):
        return [0.0] * num_prompts
    rates = np.full(num_prompts, request_rate) if ramp_up is None else ramp_up.rates(num_prompts)
    intervals = np.random.default_rng(seed).gamma(burstiness, 1.0, num_prompts) / rates
    times = np.cumsum(intervals)
    scaled: list[float] = (times * ((1 / rates).sum() / times[-1])).tolist()
    return scaled
