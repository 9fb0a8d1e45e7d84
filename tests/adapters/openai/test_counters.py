"""Numbers that front ends share, and the page that is made of them."""

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagedcore.engine.info import EngineInfo
from pagedcore.request import SamplingParams
from pagedcore_openai.counters import HISTOGRAMS, Counters
from pagedcore_openai.metrics import exposition
from pagedcore_openai.timing import RequestTiming

INFO = EngineInfo(
    model="folder",
    served_model_names=("name", "alias"),
    max_model_len=2048,
    vocab_size=512,
    block_size=16,
    num_blocks=100,
    max_num_seqs=8,
    startup_seconds={"total": 1.5},
)


def by_name(counters):
    return {h.name: (counts, total) for h, counts, total in counters.histograms()}


def samples(page):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_slots_are_added_up():
    counters = Counters(3)
    for index in range(3):
        counters.slot(index).add("draining", index)
        counters.slot(index).observe("request_params_n", 5)
    assert counters.value("draining") == 3
    assert by_name(counters)["request_params_n"] == ([0, 0, 3, 0, 0, 0], 15)


@pytest.mark.parametrize(
    ("value", "bucket"), [(0, 0), (1, 0), (1.5, 1), (2, 1), (20, 4), (21, 5), (math.inf, 5)]
)
def test_a_bound_is_within_its_bucket(value, bucket):
    counters = Counters()
    counters.slot().observe("request_params_n", value)
    counts, _ = by_name(counters)["request_params_n"]
    assert counts.index(1) == bucket


def test_bounds_rise_and_no_name_is_there_twice():
    for histogram in HISTOGRAMS:
        assert list(histogram.bounds) == sorted(set(histogram.bounds))
    assert len({histogram.name for histogram in HISTOGRAMS}) == len(HISTOGRAMS)


def test_times_are_those_between_tokens():  # METRIC-6
    counters = Counters()
    timing = RequestTiming(counters.slot(), SamplingParams(max_tokens=9), 7, arrival=10.0)
    timing.scheduled(queue_seconds=0.25)
    timing.took(0, 1, 10.5)
    timing.took(0, 2, 10.75)  # two tokens that came together are one observation
    timing.took(0, 1, 11.5)
    timing.ended(0, num_cached_tokens=4)

    found = by_name(counters)
    assert found["time_to_first_token_seconds"][1] == 0.5
    assert found["inter_token_latency_seconds"][1] == 1.0
    assert sum(found["inter_token_latency_seconds"][0]) == 2
    assert found["e2e_request_latency_seconds"][1] == 1.5
    assert found["request_decode_time_seconds"][1] == 1.0
    assert found["request_time_per_output_token_seconds"][1] == pytest.approx(1 / 3)
    assert found["request_queue_time_seconds"][1] == 0.25
    assert found["request_prefill_time_seconds"][1] == 0.25
    assert found["request_inference_time_seconds"][1] == 1.25
    assert found["request_prefill_kv_computed_tokens"][1] == 3
    assert found["request_params_max_tokens"][1] == 9


def test_one_token_has_no_time_per_token():  # METRIC-6
    counters = Counters()
    timing = RequestTiming(counters.slot(), SamplingParams(), 7, arrival=10.0)
    timing.took(0, 1, 10.5)
    timing.ended(0, num_cached_tokens=0)
    assert sum(by_name(counters)["request_time_per_output_token_seconds"][0]) == 0


def test_a_prompts_series_wait_for_its_last_choice():  # METRIC-7
    counters = Counters()
    timing = RequestTiming(counters.slot(), SamplingParams(n=2), 7, arrival=10.0)
    timing.took(0, 3, 10.5)
    timing.ended(0, num_cached_tokens=0)
    assert sum(by_name(counters)["request_params_n"][0]) == 0
    timing.took(1, 5, 10.5)
    timing.ended(1, num_cached_tokens=0)
    assert by_name(counters)["request_params_n"][1] == 2
    assert by_name(counters)["request_max_num_generation_tokens"][1] == 5


def test_two_engines_share_a_page():  # METRIC-2
    page = exposition([(INFO, {"generation_tokens": i}, Counters()) for i in (3, 4)], alias=None)
    found = samples(page)
    name = "pagedcore:generation_tokens_total"
    for number, count in (("0", 3), ("1", 4)):
        assert found[name, ("engine", number), ("model_name", "name")] == count


def test_ends_by_stop_strings_and_probes_are_set_right():  # METRIC-10, LIFE-2
    counters = Counters()
    slot = counters.slot()
    slot.add("stop_strings", 2)
    for name in ("probe_prompt_tokens", "probe_generation_tokens", "probe_ends"):
        slot.add(name)
    stats = {
        "request_success_stop": 1,
        "request_success_abort": 3,
        "request_success_length": 4,
        "prompt_tokens": 10,
        "prompt_tokens_cached": 4,
        "generation_tokens": 8,
    }
    found = samples(exposition([(INFO, stats, counters)], alias=None))

    def of(name, **labels):
        labels = {"engine": "0", "model_name": "name", **labels}
        return found[(f"pagedcore:{name}", *sorted(labels.items()))]

    reasons = {
        reason: of("request_success_total", finished_reason=reason)
        for reason in ("stop", "abort", "length", "error", "repetition")
    }
    assert reasons == {"stop": 3, "abort": 1, "length": 3, "error": 0, "repetition": 0}
    assert of("prompt_tokens_total") == 9
    assert of("prompt_tokens_by_source_total", source="local_compute") == 5
    assert of("prompt_tokens_by_source_total", source="local_cache_hit") == 4
    assert of("generation_tokens_total") == 7


def test_bounds_of_tokens_end_at_the_models_length():  # METRIC-5
    found = samples(exposition([(INFO, {}, Counters())], alias=None))
    bounds = [
        dict(key[1:])["le"] for key in found if key[0] == "pagedcore:request_prompt_tokens_bucket"
    ]
    assert bounds[-2:] == ["2000.0", "+Inf"]
