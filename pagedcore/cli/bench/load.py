"""Random requests: how long prompts and answers are, and when they come."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagedcore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RandomRequest:
    """One prompt, and how many tokens its answer shall have."""

    prompt_token_ids: list[int]
    output_len: int


def random_requests(
    num_prompts: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float,
    prefix_len: int,
    vocab_size: int,
    seed: int,
) -> list[RandomRequest]:
    """Requests of random tokens, the same for the same seed.

    Lengths are uniform in [len * (1 - range_ratio), len * (1 + range_ratio)]; the first
    `prefix_len` tokens are common to all and come on top. Raises ConfigError for values that make
    no sense.
    """
    counts = {
        "num_prompts": num_prompts,
        "input_len": input_len + prefix_len,
        "output_len": output_len,
    }
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if not 0 <= range_ratio < 1:
        raise ConfigError(f"random_range_ratio must be in [0, 1), not {range_ratio}")
    rng = np.random.default_rng(seed)
    inputs = _lengths(rng, num_prompts, input_len, range_ratio)
    outputs = _lengths(rng, num_prompts, output_len, range_ratio)
    prefix = rng.integers(0, vocab_size, prefix_len).tolist()
    return [
        RandomRequest(prefix + rng.integers(0, vocab_size, length).tolist(), int(output))
        for length, output in zip(inputs, outputs, strict=True)
    ]


def _lengths(
    rng: np.random.Generator, num: int, length: int, range_ratio: float
) -> NDArray[np.int64]:
    least = math.floor(length * (1 - range_ratio))
    most = math.ceil(length * (1 + range_ratio))
    return np.maximum(rng.integers(least, most + 1, num), min(length, 1))


def arrival_times(
    num_prompts: int, *, request_rate: float, burstiness: float, seed: int
) -> Sequence[float]:
    """Seconds from the start at which requests are sent.

    Intervals follow a gamma distribution with shape `burstiness` and mean 1 / request_rate; 1 is a
    Poisson process, below is burstier, above more even. They are scaled so that the last request
    comes at num_prompts / request_rate. An infinite rate sends all at once.
    """
    if not request_rate > 0:
        raise ConfigError(f"request_rate must be above 0, not {request_rate}")
    if not burstiness > 0:
        raise ConfigError(f"burstiness must be above 0, not {burstiness}")
    if math.isinf(request_rate):
        return [0.0] * num_prompts
    intervals = np.random.default_rng(seed).gamma(burstiness, 1.0, num_prompts)
    times = np.cumsum(intervals)
    scaled: list[float] = (times * (num_prompts / request_rate / times[-1])).tolist()
    return scaled
