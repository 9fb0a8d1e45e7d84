"""Requests of random tokens: how long prompts and answers are, and what prompts have in common."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagedcore.errors import ConfigError

LEAST_LEN, MOST_PROMPT, MOST_TOTAL = 4, 1024, 2048
"""Tokens that a request of chats may have: of each side, of a prompt, and of both sides."""

PROMPT_MEDIAN, ANSWER_MEDIAN, SPREAD = 130.0, 100.0, 1.4
"""Medians of the lengths of chats, and the deviation of their logarithms."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt, and how many tokens its answer shall have."""

    prompt: list[int] | str
    """Token ids, or text."""

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
) -> list[Ask]:
    """Requests of random tokens, the same for the same seed.

    Lengths are uniform in [len * (1 - range_ratio), len * (1 + range_ratio)]; the first
    `prefix_len` tokens are common to all and come on top. Raises ConfigError for values that make
    no sense.
    """
    _check_counts(input_len=input_len + prefix_len, output_len=output_len)
    if not 0 <= range_ratio < 1:
        raise ConfigError(f"random_range_ratio must be in [0, 1), not {range_ratio}")
    rng = np.random.default_rng(seed)
    inputs = _lengths(rng, num_prompts, input_len, range_ratio)
    outputs = _lengths(rng, num_prompts, output_len, range_ratio)
    prefix = rng.integers(0, vocab_size, prefix_len).tolist()
    return [
        Ask(prefix + rng.integers(0, vocab_size, length).tolist(), int(output))
        for length, output in zip(inputs, outputs, strict=True)
    ]


def repeated_prefixes(
    num_prompts: int,
    *,
    prefix_len: int,
    suffix_len: int,
    num_prefixes: int,
    output_len: int,
    vocab_size: int,
    seed: int,
    shuffle: bool,
) -> list[Ask]:
    """Random prompts that begin with one of `num_prefixes` prefixes each, as evenly as they can.

    Without `shuffle`, those of one prefix follow each other. Raises ConfigError for values that
    make no sense.
    """
    _check_counts(
        prefix_repetition_num_prefixes=num_prefixes,
        prefix_repetition_output_len=output_len,
        prefix_repetition_prefix_len=prefix_len,
        prefix_repetition_suffix_len=suffix_len,
    )
    if num_prompts < num_prefixes:
        raise ConfigError(
            f"num_prompts is {num_prompts}, too few for {num_prefixes} prefixes: "
            "lower prefix_repetition_num_prefixes"
        )
    rng = np.random.default_rng(seed)
    prefixes = rng.integers(0, vocab_size, (num_prefixes, prefix_len)).tolist()
    of_each = np.sort(np.arange(num_prompts) % num_prefixes)
    if shuffle:
        rng.shuffle(of_each)
    return [
        Ask(prefixes[i] + rng.integers(0, vocab_size, suffix_len).tolist(), output_len)
        for i in of_each.tolist()
    ]


def chat_like_requests(
    num_prompts: int, *, output_len: int | None, vocab_size: int, seed: int
) -> list[Ask]:
    """Random tokens with lengths as uneven as those of people's chats with a model.

    Logarithms of the lengths are normal. What would not be taken of real chats is drawn again:
    below 4 tokens, prompts above 1,024, and both sides above 2,048 together. Means are then near
    200 tokens of a prompt, and of an answer. `output_len` gives all answers one length.
    """
    _check_counts(output_len=1 if output_len is None else output_len)
    rng = np.random.default_rng(seed)
    requests: list[Ask] = []
    while len(requests) < num_prompts:
        lengths = np.exp(rng.normal(np.log([PROMPT_MEDIAN, ANSWER_MEDIAN]), SPREAD))
        prompt, answer = map(int, lengths)
        if suits(prompt, answer):
            ids = rng.integers(0, vocab_size, prompt).tolist()
            requests.append(Ask(ids, answer if output_len is None else output_len))
    return requests


def suits(prompt_len: int, output_len: int, *, answer_is_given: bool = False) -> bool:
    """Whether a chat is neither too short nor too long, by the rule of vLLM's bench."""
    return (
        LEAST_LEN <= prompt_len <= MOST_PROMPT
        and (answer_is_given or output_len >= LEAST_LEN)
        and prompt_len + output_len <= MOST_TOTAL
    )


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")


def _lengths(
    rng: np.random.Generator, num: int, length: int, range_ratio: float
) -> NDArray[np.int64]:
    least = math.floor(length * (1 - range_ratio))
    most = math.ceil(length * (1 + range_ratio))
    return np.maximum(rng.integers(least, most + 1, num), min(length, 1))
