"""GET /metrics: names, labels and arithmetic of semantics METRIC."""

import re

from prometheus_client.parser import text_string_to_metric_families

GAUGES = {
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "engine_sleep_state",
    "cache_config_info",
    "startup_time_seconds",
}
COUNTERS = {
    "prefix_cache_queries",
    "prefix_cache_hits",
    "external_prefix_cache_queries",
    "external_prefix_cache_hits",
    "mm_cache_queries",
    "mm_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "prompt_tokens_by_source",
    "generation_tokens",
    "request_success",
    "admission_rejections",
    "corrupted_requests",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "fork_requests",
    "cow_block_copies",
    "grammar_cache_hits",
    "plugin_observers_quarantined",
}
HISTOGRAMS = {
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
    "request_params_n",
    "request_num_preemptions",
    "iteration_tokens_total",
}


def families(server, prefix="pagedcore:"):
    """Metric families by name without prefix."""
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        family.name.removeprefix(prefix): family
        for family in text_string_to_metric_families(answer.body.decode())
        if family.name.startswith(prefix)
    }


def value(families, name, suffix="", **labels):
    (found,) = [
        sample.value
        for sample in families[name].samples
        if sample.name.endswith(name + suffix) and labels.items() <= sample.labels.items()
    ]
    return found


def test_every_series_of_the_list_is_there(server):  # METRIC-1, METRIC-3, METRIC-5
    found = families(server)
    types = {name: family.type for name, family in found.items()}
    assert {n for n, kind in types.items() if kind == "gauge"} >= GAUGES
    assert {n for n, kind in types.items() if kind == "counter"} >= COUNTERS
    assert {n for n, kind in types.items() if kind == "histogram"} >= HISTOGRAMS
    for family in found.values():
        for sample in family.samples:
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("fake", "0")


def test_bounds_are_those_of_the_table(server):  # METRIC-5
    found = families(server)

    def bounds(name):
        samples = found[name].samples
        return [s.labels["le"] for s in samples if s.name.endswith("_bucket")]

    assert bounds("request_params_n") == ["1.0", "2.0", "5.0", "10.0", "20.0", "+Inf"]
    assert bounds("request_prompt_tokens")[-3:] == ["1000.0", "2000.0", "+Inf"]
    assert bounds("e2e_request_latency_seconds")[-3:] == ["1920.0", "7680.0", "+Inf"]
    assert bounds("time_to_first_token_seconds")[:2] == ["0.001", "0.005"]
    assert bounds("inter_token_latency_seconds")[-2:] == ["80.0", "+Inf"]


def test_sequences_and_prompts_are_counted_and_probes_and_refusals_are_not(start):
    # METRIC-6, METRIC-7, LIFE-2, QUEUE-3
    with start() as server:
        server.get("/health_generate")
        server.complete(max_tokens=0)
        before = families(server)
        server.complete(["abc", "defg"], n=2, seed=0, max_tokens=4)
        found = families(server)
    assert value(before, "request_prompt_tokens", "_count") == 0
    assert value(before, "prompt_tokens", "_total") <= 0
    reasons = {sample.labels.get("reason") for sample in found["admission_rejections"].samples}
    assert reasons >= {"queued_reqs", "queued_tokens", "tenant_limit", "draining", "not_ready"}
    assert value(found, "request_prompt_tokens", "_count") == 4
    assert value(found, "request_prompt_tokens", "_sum") == 14
    assert value(found, "request_generation_tokens", "_sum") == 16
    assert value(found, "time_to_first_token_seconds", "_count") == 4
    assert value(found, "e2e_request_latency_seconds", "_count") == 4
    for name in ("queue", "prefill", "decode", "inference"):
        assert value(found, f"request_{name}_time_seconds", "_count") == 4
    assert value(found, "request_params_n", "_sum") == 4
    assert value(found, "request_params_n", "_count") == 2
    assert value(found, "request_max_num_generation_tokens", "_count") == 2


def test_all_five_reasons_are_there_from_the_start(server):
    reasons = {s.labels.get("finished_reason") for s in families(server)["request_success"].samples}
    assert reasons >= {"stop", "length", "abort", "error", "repetition"}


def test_an_alias_exports_each_series_again(generous):  # METRIC-4
    generous.complete(max_tokens=3)
    ours, theirs = families(generous), families(generous, "vllm:")
    assert ours.keys() <= theirs.keys()
    assert theirs.keys() - ours.keys() == {
        "gpu_cache_usage_perc",
        "time_per_output_token_seconds",
        "num_requests_swapped",
    }
    name = "time_to_first_token_seconds"
    assert value(ours, name, "_count") == value(theirs, name, "_count") >= 1


def test_what_runs_is_a_gauge(server, client):
    server.engine.pause()
    stream = client.completions.create(model="fake", prompt="abc", stream=True, max_tokens=9)
    server.engine.advance(1)
    assert value(families(server), "num_requests_running") == 1
    server.engine.release()
    list(stream)
    assert value(families(server), "num_requests_running") == 0  # METRIC-10


def test_the_page_is_what_prometheus_reads(server):
    text = server.get("/metrics").body.decode()
    for line in text.splitlines():
        assert re.match(r"#|[a-zA-Z_:][a-zA-Z0-9_:]*(\{.*\})? [-+0-9.eEInfNa]+$", line)
