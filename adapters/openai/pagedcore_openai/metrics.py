"""GET /metrics: what the engine counts, and what its front ends do, for Prometheus."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pagedcore.engine.info import EngineInfo
from pagedcore.metrics import (
    ENGINE_BOUNDS,
    PREEMPTIONS,
    STEP_TOKENS,
    bucket_name,
    sum_name,
)
from pagedcore.request import FinishReason
from pagedcore_openai.counters import REFUSALS, Counters, Histogram

PREFIX = "pagedcore:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

GAUGES = {
    "num_requests_running": "Sequences in the running batch.",
    "num_requests_waiting": "Sequences that wait.",
    "kv_cache_usage_perc": "Share of cache blocks in use, in 0..1.",
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found there.",
    "external_prefix_cache_queries": "Prompt tokens looked up in a cache elsewhere.",
    "external_prefix_cache_hits": "Prompt tokens found there.",
    "mm_cache_queries": "Multimodal items looked up in their cache.",
    "mm_cache_hits": "Multimodal items found there.",
    "num_preemptions": "Times that a running sequence gave its blocks back.",
    "prompt_tokens": "Prompt tokens processed, once for each prompt.",
    "prompt_tokens_cached": "Prompt tokens taken from the cache.",
    "generation_tokens": "Tokens generated.",
    "corrupted_requests": "Sequences that ended because their logits were not numbers.",
    "spec_decode_num_drafts": "Drafts proposed.",
    "spec_decode_num_draft_tokens": "Tokens proposed.",
    "spec_decode_num_accepted_tokens": "Tokens accepted.",
    "fork_requests": "Choices that share their prompt with another.",
    "cow_block_copies": "Blocks copied at the first write after a fork.",
    "grammar_cache_hits": "Grammars found compiled.",
    "plugin_observers_quarantined": "Observers of plugins that failed, and are not called again.",
}
ENGINE_HISTOGRAMS = (
    Histogram(STEP_TOKENS, "Tokens that a step runs.", ENGINE_BOUNDS[STEP_TOKENS]),
    Histogram(PREEMPTIONS, "Times that a sequence was preempted.", ENGINE_BOUNDS[PREEMPTIONS]),
)
OLD_NAMES = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}
"""What older dashboards of vLLM call a series (METRIC-4)."""

Labels = dict[str, str]
Sample = tuple[Labels, float]


def exposition(
    engines: Iterable[tuple[EngineInfo, Mapping[str, float], Counters]], *, alias: str | None
) -> bytes:
    """The page for these engines: what each is, its `stats`, and what its front ends counted.

    `alias` is a second prefix, such as "vllm".
    """
    registry = CollectorRegistry(auto_describe=False)
    for number, engine in enumerate(engines):
        registry.register(_EngineCollector(number, *engine, alias=alias))
    return generate_latest(registry)


class _EngineCollector(Collector):
    """The series of one engine."""

    def __init__(
        self,
        number: int,
        info: EngineInfo,
        stats: Mapping[str, float],
        counters: Counters,
        *,
        alias: str | None,
    ) -> None:
        self._info = info
        self._stats = stats
        self._counters = counters
        self._alias = alias
        self._labels = {"model_name": info.served_model_names[0], "engine": str(number)}

    def describe(self) -> list[Metric]:
        """Nothing: two engines have the same series, with other labels."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every series under its name, and again under the alias."""
        prefixes = [PREFIX] if self._alias is None else [PREFIX, f"{self._alias}:"]
        for prefix in prefixes:
            yield from self._gauges(prefix)
            yield from self._counts(prefix)
            yield from self._histograms(prefix)
        if self._alias is not None:
            yield from self._old_names(f"{self._alias}:")

    def _gauges(self, prefix: str) -> Iterator[Metric]:
        stats, info = self._stats, self._info
        for name, about in GAUGES.items():
            yield self._gauge(prefix + name, about, [({}, stats.get(name, 0.0))])
        deferred = stats.get("num_requests_deferred", 0.0)
        capacity = stats.get("num_requests_waiting", 0.0) - deferred
        yield self._gauge(
            f"{prefix}num_requests_waiting_by_reason",
            "Sequences that wait, by what they wait for.",
            [({"reason": "capacity"}, capacity), ({"reason": "deferred"}, deferred)],
        )
        states = {"awake": 1.0, "weights_offloaded": 0.0, "discard_all": 0.0}
        yield self._gauge(
            f"{prefix}engine_sleep_state",
            "The one that is 1.",
            [({"sleep_state": state}, value) for state, value in states.items()],
        )
        config = {
            "block_size": info.block_size,
            "num_gpu_blocks": info.num_blocks,
            "max_model_len": info.max_model_len,
            "max_num_seqs": info.max_num_seqs,
        }
        labels = {name: str(value) for name, value in config.items()}
        yield self._gauge(f"{prefix}cache_config_info", "The configuration.", [(labels, 1.0)])
        yield self._gauge(
            f"{prefix}startup_time_seconds",
            "Seconds of each phase of the start.",
            [({"phase": phase}, value) for phase, value in info.startup_seconds.items()],
        )

    def _counts(self, prefix: str) -> Iterator[Metric]:
        stats, extra = self._stats, self._counters.value
        probes = {
            "prompt_tokens": extra("probe_prompt_tokens"),
            "generation_tokens": extra("probe_generation_tokens"),
        }
        for name, about in COUNTERS.items():
            value = stats.get(name, 0.0) - probes.get(name, 0.0)
            yield self._counter(prefix + name, about, [({}, value)])
        computed = stats.get("prompt_tokens", 0.0) - probes["prompt_tokens"]
        cached = stats.get("prompt_tokens_cached", 0.0)
        sources = {
            "local_compute": computed - cached,
            "local_cache_hit": cached,
            "external_kv_transfer": 0.0,
        }
        yield self._counter(
            f"{prefix}prompt_tokens_by_source",
            "Prompt tokens, by where their keys and values come from.",
            [({"source": source}, value) for source, value in sources.items()],
        )
        yield self._counter(
            f"{prefix}request_success",
            "Sequences that ended, by reason.",
            [({"finished_reason": reason}, self._ended(reason)) for reason in FinishReason],
        )
        yield self._counter(
            f"{prefix}admission_rejections",
            "Requests that were refused, by reason.",
            [({"reason": reason}, value) for reason, value in self._rejections().items()],
        )

    def _ended(self, reason: str) -> float:
        """An engine takes an end by a stop string for an abort, and a probe for a request."""
        count = self._stats.get(f"request_success_{reason}", 0.0)
        stops = self._counters.value("stop_strings")
        match reason:
            case "stop":
                return count + stops
            case "abort":
                return count - stops
            case "length":
                return count - self._counters.value("probe_ends")
            case _:
                return count

    def _rejections(self) -> dict[str, float]:
        prefix = "admission_rejections_"
        counts = {"queued_reqs": 0.0, "queued_tokens": 0.0}
        counts |= {name: self._counters.value(name) for name in REFUSALS}
        for name, value in self._stats.items():
            if name.startswith(prefix):
                reason = name.removeprefix(prefix)
                counts[reason] = counts.get(reason, 0.0) + value
        return counts

    def _histograms(self, prefix: str) -> Iterator[Metric]:
        for histogram, counts, total in self._counters.histograms():
            yield self._histogram(prefix + histogram.name, histogram, counts, total)
        for histogram in ENGINE_HISTOGRAMS:
            name, stats = histogram.name, self._stats
            numbers = range(len(histogram.bounds) + 1)
            counts = [stats.get(bucket_name(name, number), 0.0) for number in numbers]
            total = stats.get(sum_name(name), 0.0)
            yield self._histogram(prefix + name, histogram, counts, total)

    def _old_names(self, prefix: str) -> Iterator[Metric]:
        usage = self._stats.get("kv_cache_usage_perc", 0.0)
        name = OLD_NAMES["kv_cache_usage_perc"]
        yield self._gauge(prefix + name, GAUGES["kv_cache_usage_perc"], [({}, usage)])
        for histogram, counts, total in self._counters.histograms():
            old = OLD_NAMES.get(histogram.name)
            if old is not None:
                yield self._histogram(prefix + old, histogram, counts, total)
        yield self._gauge(f"{prefix}num_requests_swapped", "Always 0.", [({}, 0.0)])

    def _gauge(self, name: str, about: str, samples: Iterable[Sample]) -> Metric:
        return self._family(GaugeMetricFamily, name, about, samples)

    def _counter(self, name: str, about: str, samples: Iterable[Sample]) -> Metric:
        return self._family(CounterMetricFamily, name, about, samples)

    def _family(
        self, kind: Any, name: str, about: str, samples: Iterable[tuple[Labels, float]]
    ) -> Metric:
        samples = list(samples)
        names = [*self._labels, *(samples[0][0] if samples else ())]
        family: Metric = kind(name, about, labels=names)
        for labels, value in samples:
            family.add_metric([*self._labels.values(), *labels.values()], value)  # type: ignore[attr-defined]
        return family

    def _histogram(
        self, name: str, histogram: Histogram, counts: list[float], total: float
    ) -> Metric:
        limit = self._info.max_model_len if histogram.is_tokens else float("inf")
        buckets, so_far = [], 0.0
        for bound, count in zip(histogram.bounds, counts, strict=False):
            so_far += count
            if bound <= limit:
                buckets.append((str(float(bound)), so_far))
        buckets.append(("+Inf", sum(counts)))
        family = HistogramMetricFamily(name, histogram.help, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets, total)
        return family
