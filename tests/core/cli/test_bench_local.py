"""`pagedcore bench latency|throughput|startup`: what is run, and what is written."""

import io
import json
from types import SimpleNamespace
from typing import ClassVar

import pytest

import pagedcore
from pagedcore.cli import main
from pagedcore.cli.bench import report, start_once, startup


class Counter:
    """An `LLM` that answers at once, with as many tokens as were asked for."""

    made: ClassVar = []

    def __init__(self, model, **options):
        self.model, self.options, self.calls = model, options, []
        self.engine = SimpleNamespace(info=SimpleNamespace(vocab_size=11))
        self.tokenizer = SimpleNamespace(encode=str.split)
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


def test_throughput_asks_the_chats_of_a_file(bench, tmp_path):
    path = tmp_path / "chats.json"
    turns = [{"from": "human", "value": "a b c d e"}, {"from": "gpt", "value": "f g h i"}]
    path.write_text(json.dumps([{"conversations": turns}]))
    chats = ["--dataset-name", "sharegpt", "--dataset-path", str(path), "--num-prompts", "2"]
    _, _, llm = bench("throughput", *chats)
    prompts, params = llm.calls[0]
    assert prompts == ["a b c d e"] * 2
    assert [p.max_tokens for p in params] == [4, 4]


def test_prompts_of_a_throughput_begin_alike(bench, capsys):
    few = ["--num-prompts", "3", "--input-len", "4", "--prefix-len", "5"]
    prompts, _ = bench("throughput", *few)[2].calls[0]
    assert len({tuple(prompt[:5]) for prompt in prompts}) == 1
    assert [len(prompt) for prompt in prompts] == [9] * 3
    assert bench("throughput", *few, "--random-prefix-len", "5")[0] == 1
    assert "the same" in capsys.readouterr().err


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


def test_starts_are_counted_by_kind_and_phase(bench, monkeypatch, capsys):
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
    shown = capsys.readouterr().out
    assert "cold cache" in shown
    assert "warm cache" in shown
    assert "weights" in shown
    assert len(set(caches[:2])) == 2
    assert len(set(caches[2:])) == 1


@pytest.fixture
def start_lines(monkeypatch, capsys):
    """What a process that starts tells, each line as JSON."""

    class Starting(Counter):
        def __init__(self, model, **options):
            super().__init__(model, **options)
            seconds = {"config": 0.5, "weights": -3.0, "profile": -2.0, "total": 9.0}
            steps = [True, True, False]
            self.engine.info.startup_seconds = seconds
            self.engine.prepare = lambda: steps.pop(0)

    monkeypatch.setitem(vars(pagedcore), "LLM", Starting)
    monkeypatch.setattr(Counter, "made", [])
    order = {"model": "here", "stop": ["a"], "seed": 3}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(order)))
    assert start_once.main() == 0
    assert Counter.made[0].options == {"stop": ("a",), "seed": 3}
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_start_tells_its_phases_and_then_its_graphs(start_lines):
    ready, prepared = start_lines
    assert list(ready) == ["config", "weights", "profile"]
    assert ready["config"] >= 5.0  # what the engine's other phases leave of the time to be ready
    assert list(prepared) == ["graphs"]


def test_an_engine_that_does_not_start_ends_the_benchmark(bench, capfd, tmp_path):
    counts = ["--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "0"]
    assert bench("startup", str(tmp_path / "nowhere"), *counts)[0] == 1
    assert "did not start" in capfd.readouterr().err


PNG = b"\x89PNG\r\n\x1a\n"


def test_latencies_are_drawn_when_asked(bench, tmp_path):
    path = tmp_path / "new" / "chart.png"
    few = ["--num-iters", "3", "--num-iters-warmup", "0", "--plot", str(path)]
    assert bench("latency", *few)[0] == 0
    assert path.read_bytes().startswith(PNG)


def test_starts_are_drawn_when_asked(bench, monkeypatch, tmp_path):
    phases = {"import": 2.0, "weights": 1.0, "total": 3.0, "graphs": 4.0}
    monkeypatch.setattr(startup, "_start", lambda order, cache: (3.0, phases))
    path = tmp_path / "chart.png"
    assert bench("startup", "--num-iters-cold", "0", "--plot", str(path))[0] == 0
    assert path.read_bytes().startswith(PNG)


def test_a_chart_that_cannot_be_written_is_one_line(bench, tmp_path, capsys):
    (tmp_path / "deep").write_text("in the way")
    few = ["--num-iters", "1", "--num-iters-warmup", "0"]
    assert main(["bench", "latency", *few, "--plot", str(tmp_path / "deep" / "chart.png")]) == 1
    error = capsys.readouterr().err
    assert "cannot write the chart" in error
    assert error.strip().count("\n") == 0


@pytest.mark.parametrize("kind", ["latency", "startup", "serve", "kernels"])
def test_without_matplotlib_one_line_names_what_to_install(kind, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert main(["bench", kind, "--plot", "chart.png"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'pagedcore[plots]'" in error
    assert error.count("\n") == 1
