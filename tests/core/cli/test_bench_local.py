"""`pagedcore bench latency|throughput|startup`: what is run, and what is written."""

import json
from types import SimpleNamespace
from typing import ClassVar

import pytest

import pagedcore
from pagedcore.cli import main
from pagedcore.cli.bench import startup


class Counter:
    """An `LLM` that answers at once, with as many tokens as were asked for."""

    made: ClassVar = []

    def __init__(self, model, **options):
        self.model, self.options, self.calls = model, options, []
        self.engine = SimpleNamespace(info=SimpleNamespace(vocab_size=11))
        Counter.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def generate(self, prompts, params, progress=True):
        listed = params if isinstance(params, list) else [params] * len(prompts)
        self.calls.append((prompts, listed))
        return [
            SimpleNamespace(
                prompt_token_ids=prompt,
                outputs=[SimpleNamespace(token_ids=[1] * p.max_tokens)] * p.n,
            )
            for prompt, p in zip(prompts, listed, strict=True)
        ]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.setitem(vars(pagedcore), "LLM", Counter)
    monkeypatch.setattr(Counter, "made", [])

    def run(kind, *flags):
        path = tmp_path / "deep" / "result.json"
        status = main(["bench", kind, *flags, "--output-json", str(path)])
        result = json.loads(path.read_text()) if path.exists() else None
        return status, result, Counter.made[0] if Counter.made else None

    return run


def test_latency_counts_batches_after_those_that_warm_up(bench):
    sizes = ["--batch-size", "3", "--input-len", "5", "--output-len", "2"]
    iterations = ["--num-iters", "4", "--num-iters-warmup", "2"]
    status, result, llm = bench("latency", "here", *sizes, *iterations)
    assert status == 0
    assert len(llm.calls) == 6
    prompts, params = llm.calls[0]
    assert [len(prompt) for prompt in prompts] == [5, 5, 5]
    assert all(0 <= token < 11 for prompt in prompts for token in prompt)
    assert params[0].max_tokens == 2
    assert params[0].ignore_eos
    assert len(result["latencies"]) == 4
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 4)
    assert set(result["percentiles"]) == {"10", "25", "50", "75", "90", "99"}


def test_latency_leaves_the_prefix_cache_out_unless_asked(bench):
    few = ["--num-iters", "1", "--num-iters-warmup", "0"]
    assert bench("latency", *few)[2].options["enable_prefix_caching"] is False
    Counter.made.clear()
    assert bench("latency", *few, "--enable-prefix-caching")[2].options["enable_prefix_caching"]


def test_throughput_counts_all_tokens(bench):
    sizes = ["--num-prompts", "4", "--input-len", "6", "--output-len", "3", "--prefix-len", "2"]
    status, result, llm = bench("throughput", *sizes, "--max-num-seqs", "2", "--n", "2")
    assert status == 0
    assert llm.options == {"max_num_seqs": 2}
    assert result["num_requests"] == 4
    assert result["total_num_tokens"] == 4 * (8 + 2 * 3)
    rate = result["tokens_per_second"] * result["elapsed_time"]
    assert rate == pytest.approx(result["total_num_tokens"])


def test_lengths_vary_when_asked(bench):
    sizes = ["--num-prompts", "40", "--input-len", "20", "--random-range-ratio", "0.5"]
    _, _, llm = bench("throughput", *sizes)
    lengths = {len(prompt) for prompt in llm.calls[0][0]}
    assert len(lengths) > 5
    assert min(lengths) >= 10
    assert max(lengths) <= 30


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("latency", "--num-iters"),
        ("latency", "--batch-size"),
        ("throughput", "--num-prompts"),
        ("throughput", "--output-len"),
    ],
)
def test_nothing_to_measure_is_refused(bench, kind, flag, capsys):
    assert bench(kind, flag, "0")[0] == 1
    assert "at least 1" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_one_line(bench, tmp_path, capsys):
    (tmp_path / "deep").write_text("in the way")
    assert bench("throughput", "--num-prompts", "1")[0] == 1
    assert "cannot write the result" in capsys.readouterr().err


def test_starts_are_counted_by_kind_and_phase(bench, monkeypatch):
    caches = []

    def start(order, cache):
        caches.append(cache)
        return float(len(caches)), {"weights": 2.0 * len(caches), "total": 3.0}

    monkeypatch.setattr(startup, "_start", start)
    counts = ["--num-iters-cold", "2", "--num-iters-warmup", "1", "--num-iters-warm", "2"]
    status, result, _ = bench("startup", *counts)
    assert status == 0
    assert result["cold_startup_times"] == [1.0, 2.0]
    assert result["warm_startup_times"] == [4.0, 5.0]
    assert result["avg_warm_startup_time"] == 4.5
    assert result["cold_phases"] == {"weights": 3.0, "total": 3.0}
    assert len(set(caches[:2])) == 2
    assert len(set(caches[2:])) == 1


def test_an_engine_that_does_not_start_ends_the_benchmark(bench, capfd, tmp_path):
    counts = ["--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "0"]
    assert bench("startup", str(tmp_path / "nowhere"), *counts)[0] == 1
    assert "did not start" in capfd.readouterr().err
