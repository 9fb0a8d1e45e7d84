"""What a server's benchmark reports: totals, rates, and statistics of latencies."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pagedcore.cli.bench.client import Outcome
from pagedcore.cli.bench.report import percentiles
from pagedcore.cli.bench.timeline import running_requests, token_rates
from pagedcore.errors import ConfigError

METRICS = {  # and what is timed, in a few words
    "ttft": "first token",
    "tpot": "tokens after",
    "itl": "between tokens",
    "e2el": "last token",
}


def summary(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    metrics: Sequence[str],
    wanted: Sequence[float],
    goals: Mapping[str, float],
) -> dict[str, Any]:
    """Totals, rates per second, and statistics of each metric in milliseconds.

    `wanted` are percentiles; `goals` are limits in milliseconds, by metric.
    """
    done = [outcome for outcome in outcomes if outcome.error is None]
    num_input = sum(outcome.num_input for outcome in done)
    num_output = sum(outcome.num_output for outcome in done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "request_goodput": None,
        "max_output_tokens_per_s": 0.0,
        "max_concurrent_requests": 0,
    }
    if goals:
        result["request_goodput"] = sum(_is_good(outcome, goals) for outcome in done) / duration
    if done:
        result["max_output_tokens_per_s"] = float(token_rates(done)[1].max())
        result["max_concurrent_requests"] = int(running_requests(done)[1].max())
    for name in metrics:
        values = values_ms(done, name)
        if not values:  # such as answers of one token each, which have no interval
            continue
        result[f"mean_{name}_ms"] = float(np.mean(values))
        result[f"median_{name}_ms"] = float(np.median(values))
        result[f"std_{name}_ms"] = float(np.std(values))
        for percentile, value in percentiles(values, wanted).items():
            result[f"p{percentile}_{name}_ms"] = value
    return result


def values_ms(done: Iterable[Outcome], metric: str) -> list[float]:
    """All values of a metric in milliseconds, of requests that were answered."""
    return [1000 * value for outcome in done for value in _values(outcome, metric)]


def _values(outcome: Outcome, metric: str) -> list[float]:
    """Seconds that a request adds to a metric."""
    if metric == "itl":
        return outcome.intervals
    if metric == "tpot":
        return [] if outcome.time_per_token is None else [outcome.time_per_token]
    return [outcome.time_to_first if metric == "ttft" else outcome.latency]


def _is_good(outcome: Outcome, goals: Mapping[str, float]) -> bool:
    """Whether a request kept all limits; an answer of one token keeps that of time per token."""
    return all(
        1000 * value <= most for metric, most in goals.items() for value in _values(outcome, metric)
    )


def parse_goals(texts: Sequence[str]) -> dict[str, float]:
    """Limits in milliseconds by metric; raises ConfigError for text that is none."""
    goals = {}
    for text in texts:
        metric, _, number = text.partition(":")
        try:
            goals[metric] = float(number)
        except ValueError:
            goals[metric] = math.nan
        if metric not in ("ttft", "tpot", "e2el") or not goals[metric] > 0:
            raise ConfigError(
                "goodput must be ttft, tpot or e2el with milliseconds, such as ttft:500, "
                f"not {text!r}"
            )
    return goals


def parse_metadata(texts: Sequence[str]) -> dict[str, str]:
    """Facts by name; raises ConfigError for text that is none."""
    facts = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or not name.strip():
            raise ConfigError(f"metadata must be names with values, such as gpu=H200, not {text!r}")
        facts[name.strip()] = value.strip()
    return facts


def parse_metrics(text: str) -> list[str]:
    """Names separated by commas; raises ConfigError for one that is unknown."""
    names = text.split(",")
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"percentile_metrics may hold {', '.join(METRICS)}, not {name!r}")
    return names


def parse_percentiles(text: str) -> list[float]:
    """Numbers separated by commas; raises ConfigError for one that is no percentile."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 <= percentile <= 100 for percentile in found):
        raise ConfigError(f"metric_percentiles must hold numbers in 0..100, not {text!r}")
    return found


def details(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """The numbers of each request; times are seconds, those of starts from the first of them."""
    begin = min(outcome.started for outcome in outcomes)
    return {
        "input_lens": [outcome.num_input for outcome in outcomes],
        "output_lens": [outcome.num_output for outcome in outcomes],
        "start_times": [outcome.started - begin for outcome in outcomes],
        "ttfts": [outcome.time_to_first for outcome in outcomes],
        "itls": [outcome.intervals for outcome in outcomes],
        "e2els": [outcome.latency for outcome in outcomes],
        "generated_texts": ["".join(outcome.texts) for outcome in outcomes],
        "errors": [outcome.error or "" for outcome in outcomes],
    }
