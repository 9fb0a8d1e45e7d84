"""`pagedcore bench serve` against a small server on a real socket, and the numbers it reports."""

import asyncio
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.cli import main
from pagedcore.cli.bench.client import Outcome, Server, _body, _events
from pagedcore.cli.bench.load import RampUp, arrival_times
from pagedcore.cli.bench.metrics import details, summary
from pagedcore.cli.bench.timeline import running_requests, token_rates


class Handler(BaseHTTPRequestHandler):
    """Answers as an OpenAI server does; the test's `Site` decides what and counts."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.server.site.asks_before_ready:
            self.server.site.asks_before_ready -= 1
            self._send(503, b"starting")
        else:
            self._send(200, json.dumps({"data": [{"id": "org/tiny"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        site = self.server.site
        with site.lock:
            site.bodies.append((self.path, body, self.headers.get("Authorization")))
            number = len(site.bodies)
            site.at_once += 1
            site.most_at_once = max(site.most_at_once, site.at_once)
        try:
            if number in site.failing:
                self._send(503, b'{"error": {"message": "queue_full"}}')
            else:
                self._stream(body)
        finally:
            with site.lock:
                site.at_once -= 1

    def _send(self, status, payload):
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _stream(self, body):
        site = self.server.site
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        is_chat = self.path.endswith("chat/completions")
        events = []
        if is_chat:  # says who speaks before it says anything
            events.append({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(body["max_tokens"]):
            events.append({"choices": [{"delta": {"content": "x"}} if is_chat else {"text": "x"}]})
        prompt = body.get("prompt") or body["messages"][0]["content"].split()
        usage = {"prompt_tokens": len(prompt), "completion_tokens": body["max_tokens"]}
        events.append({"choices": [], "usage": usage})
        lines = [": keep-alive\n\n", *(f"data: {json.dumps(event)}\n\n" for event in events)]
        if site.ends_streams:
            lines.append("data: [DONE]\n\n")
        for line in lines:
            data = line.encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


class Site:
    def __init__(self):
        self.lock = threading.Lock()
        self.bodies = []
        self.failing = set()
        self.ends_streams = True
        self.asks_before_ready = 0
        self.at_once = self.most_at_once = 0


@contextmanager
def running_site():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.site = Site()
        server.site.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.site
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def site():
    with running_site() as site:
        yield site


@pytest.fixture
def bench(site, tmp_path):
    def run(*flags):
        where = ["--base-url", site.url, "--result-dir", str(tmp_path), "--result-filename", "r"]
        sizes = ["--num-prompts", "6", "--random-input-len", "5", "--random-output-len", "4"]
        status = main(["bench", "serve", *where, *sizes, "--save-result", *flags])
        path = tmp_path / "r"
        return status, json.loads(path.read_text()) if path.exists() else None

    return run


def test_every_request_is_sent_and_counted(site, bench):
    status, result = bench()
    assert status == 0
    assert (result["completed"], result["failed"]) == (6, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 24)
    assert result["model_id"] == "org/tiny"
    assert result["request_rate"] == "inf"
    assert len(site.bodies) == 7  # with one that is not counted
    for path, body, key in site.bodies:
        assert path == "/v1/completions"
        assert len(body["prompt"]) == 5
        assert body["stream"] is True
        assert body["ignore_eos"] is True
        assert key is None
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert result[f"p50_{metric}_ms"] == pytest.approx(result[f"median_{metric}_ms"])
        assert result[f"mean_{metric}_ms"] >= 0
    assert result["p99_e2el_ms"] >= result["p50_ttft_ms"]


def test_chats_are_measured_from_their_first_word(site, bench):
    _, result = bench("--backend", "openai-chat", "--save-detailed")
    assert site.bodies[0][0] == "/v1/chat/completions"
    assert [len(intervals) for intervals in result["itls"]] == [3] * 6
    assert result["generated_texts"] == ["xxxx"] * 6
    assert min(result["start_times"]) == 0


def test_a_server_may_be_given_by_host_port_and_path(site, capsys):
    site.failing = {1}
    where = ["--port", site.url.rsplit(":", 1)[1], "--endpoint", "/here"]
    assert main(["bench", "serve", *where, "--num-prompts", "1"]) == 1
    assert site.bodies[0][0] == "/here"
    assert "the first request to http://127.0.0.1" in capsys.readouterr().err


def test_a_key_comes_from_the_environment(site, bench, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    _, result = bench()
    assert {key for _, _, key in site.bodies} == {"Bearer secret"}
    assert "secret" not in json.dumps(result)


def test_no_more_than_max_concurrency_run_at_once(site, bench):
    status, _ = bench("--max-concurrency", "2", "--num-prompts", "20")
    assert status == 0
    assert site.most_at_once <= 2


def test_failures_are_counted_and_told(site, bench, capsys):
    site.failing = {3, 4}
    status, result = bench()
    assert status == 1
    assert (result["completed"], result["failed"]) == (4, 2)
    assert "queue_full" in capsys.readouterr().out


def test_a_stream_that_breaks_off_is_a_failure(site, bench, capsys):
    site.ends_streams = False
    assert bench() == (1, None)
    assert "ended without [DONE]" in capsys.readouterr().err


def test_no_server_is_one_line(capsys):
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:1", "--num-prompts", "1"]) == 1
    error = capsys.readouterr().err
    assert "cannot ask http://127.0.0.1:1 for its models" in error
    assert error.count("\n") == 1


def test_goodput_counts_those_that_keep_all_limits(site, bench):
    _, result = bench("--goodput", "ttft:60000", "--goodput", "e2el:60000")
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    _, result = bench("--goodput", "ttft:60000", "e2el:0.000001", "--seed", "3")
    assert result["request_goodput"] == 0
    assert bench()[1]["request_goodput"] is None


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--goodput", "ttft"),
        ("--goodput", "speed:4"),
        ("--goodput", "ttft:-1"),
        ("--percentile-metrics", "ttft,nothing"),
        ("--metric-percentiles", "50,101"),
        ("--metric-percentiles", "many"),
        ("--max-concurrency", "0"),
        ("--num-prompts", "0"),
        ("--ramp-up-start-rps", "2"),
        ("--ramp-up-strategy", "linear"),
        ("--metadata", "gpu"),
        ("--extra-body", "[1]"),
        ("--ready-check-timeout-sec", "-1"),
        ("--plot", "chart.jpg"),
        ("--random-vocab-size", "0"),
        ("--random-input-len", "0"),
        ("--request-rate", "0"),
        ("--burstiness", "-1"),
        ("--random-range-ratio", "1"),
    ],
)
def test_a_value_without_meaning_is_refused_before_anything_is_sent(site, bench, flag, value):
    status, result = bench(flag, value)
    assert status in (1, 2)  # 2 for what no command line can mean
    assert result is None
    assert site.bodies == []


def test_a_server_that_starts_is_waited_for_when_asked(site, bench):
    site.asks_before_ready = 2
    assert bench("--ready-check-timeout-sec", "60")[0] == 0
    site.asks_before_ready = 1
    assert bench()[0] == 1


def test_a_result_says_what_was_asked_for(site, bench):
    facts = [
        "--label",
        "night",
        "--metadata",
        "gpu=H200",
        "run=3",
        "--extra-body",
        '{"top_p": 0.5}',
    ]
    ramp = [
        "--ramp-up-strategy",
        "linear",
        "--ramp-up-start-rps",
        "1e3",
        "--ramp-up-end-rps",
        "9e3",
    ]
    _, result = bench(*facts, *ramp)
    assert (result["label"], result["gpu"], result["run"]) == ("night", "H200", "3")
    assert (result["ramp_up_strategy"], result["ramp_up_end_rps"]) == ("linear", 9000)
    assert result["dataset_name"] == "random"
    assert result["endpoint_type"] == "openai"
    assert 1 <= result["max_concurrent_requests"] <= 6
    assert all(body["top_p"] == 0.5 for _, body, _ in site.bodies)


def test_latencies_and_what_happened_are_drawn(bench, tmp_path):
    path = tmp_path / "chart.png"
    assert bench("--plot", str(path))[0] == 0
    assert bench("--plot", str(path), "--random-output-len", "1")[0] == 0  # without intervals
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_chats_of_a_file_are_sent_as_text_and_counted_by_the_tokenizer(
    site, tmp_path, backend, word_tokenizer
):
    turns = [{"value": "one two three four"}, {"value": "a b c d e"}]
    chats = tmp_path / "chats.json"
    chats.write_text(json.dumps([{"conversations": turns}]))
    flags = ["--dataset-name", "sharegpt", "--dataset-path", str(chats), "--num-prompts", "2"]
    where = ["--base-url", site.url, "--backend", backend, "--tokenizer", str(word_tokenizer)]
    assert main(["bench", "serve", *where, *flags]) == 0
    for _, body, _ in site.bodies:
        assert body["max_tokens"] == 5
        text = body["prompt"] if backend == "openai" else body["messages"][0]["content"]
        assert text == "one two three four"


@pytest.fixture
def word_tokenizer(tmp_path):
    """The folder of a tokenizer whose tokens are words."""
    model = {"type": "WordLevel", "vocab": {"word": 0}, "unk_token": "word"}
    tokenizer = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": []}))
    return folder


def test_a_file_gets_its_name_from_what_was_asked_for(site, tmp_path):
    where = ["--base-url", site.url, "--result-dir", str(tmp_path), "--save-result"]
    sizes = ["--num-prompts", "1", "--random-output-len", "1", "--max-concurrency", "2"]
    assert main(["bench", "serve", *where, *sizes, "--label", "night"]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("night-infqps-concurrency2-tiny-")


def test_answers_of_one_token_have_no_intervals_to_report(bench):
    status, result = bench("--random-output-len", "1")
    assert status == 0
    assert "mean_tpot_ms" not in result
    assert "mean_ttft_ms" in result


def test_a_timeline_counts_what_runs_and_what_comes():
    done = [
        Outcome(10.0, None, 5, 4, 0.5, [1.0], 1.5),  # two tokens at 10.5, two at 11.5
        Outcome(11.0, None, 5, 2, 0.25, [0.25], 0.5),  # one at 11.25, one at 11.5
        Outcome(11.5, None, 5, 1, 0.5, [], 0.5),  # one at 12.0, as the others end and it starts
    ]
    moments, running = running_requests(done)
    assert list(moments) == [0.0, 1.0, 1.5, 1.5, 1.5, 2.0]
    assert list(running) == [1, 2, 1, 0, 1, 0]
    starts, rates = token_rates(done)
    assert list(starts) == [0.0, 1.0, 2.0]
    assert list(rates) == [2.0, 5.0, 5.0]
    assert details(done)["start_times"] == [0.0, 1.0, 1.5]


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.integers(1, 9), st.lists(st.floats(0, 3), max_size=5)),
        min_size=1,
        max_size=20,
    ),
    st.floats(0.05, 5),
)
def test_no_token_is_lost_in_a_timeline(requests, bin_s):
    done = [
        Outcome(100 + start, None, 1, num, 0.25, gaps, 0.25 + sum(gaps))
        for start, num, gaps in requests
    ]
    _, rates = token_rates(done, bin_s)
    assert rates[:-1].sum() * bin_s == pytest.approx(sum(outcome.num_output for outcome in done))
    _, running = running_requests(done)
    assert running.min() >= 0
    assert running[-1] == 0


def test_the_statistics_are_those_of_the_definitions():
    outcomes = [
        Outcome(0.0, None, 10, 5, 0.1, [0.1] * 4, 0.5),
        Outcome(0.0, None, 20, 1, 0.3, [], 0.3),
        Outcome(0.0, "lost"),
    ]
    result = summary(
        outcomes,
        2.0,
        metrics=["ttft", "tpot", "itl", "e2el"],
        wanted=[50, 99.9],
        goals={"ttft": 200.0, "tpot": 150.0},
    )
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["p50_ttft_ms"] == pytest.approx(200)
    assert result["p99.9_ttft_ms"] == pytest.approx(np.percentile([100, 300], 99.9))
    assert result["mean_tpot_ms"] == pytest.approx(100)  # the one of a single token has none
    assert result["std_itl_ms"] == pytest.approx(0, abs=1e-9)
    assert result["mean_e2el_ms"] == pytest.approx(400)
    assert result["request_goodput"] == 0.5
    assert result["output_throughput"] == 3.0
    assert (result["completed"], result["failed"]) == (2, 1)


@given(st.integers(1, 200), st.floats(0.1, 50), st.floats(0.1, 20), st.integers(0, 99))
def test_requests_come_at_the_rate_that_was_asked_for(num, rate, burstiness, seed):
    times = arrival_times(num, request_rate=rate, burstiness=burstiness, seed=seed)
    assert len(times) == num
    assert times == sorted(times)
    assert times[-1] == pytest.approx(num / rate)


def test_burstiness_changes_how_even_arrivals_are():
    def spread(burstiness):
        times = arrival_times(4000, request_rate=1.0, burstiness=burstiness, seed=1)
        return np.std(np.diff(times))

    assert spread(1.0) == pytest.approx(1.0, rel=0.1)  # Poisson
    assert spread(4.0) == pytest.approx(0.5, rel=0.1)
    assert spread(0.25) == pytest.approx(2.0, rel=0.1)


@given(
    st.sampled_from(["linear", "exponential"]),
    st.floats(0.1, 50),
    st.floats(0.1, 50),
    st.integers(2, 300),
)
def test_a_ramp_goes_from_one_rate_towards_the_other(strategy, start, end, num):
    ramp = RampUp(strategy, start, end)
    rates = ramp.rates(num)
    assert rates[0] == pytest.approx(start)
    assert min(start, end) * 0.999 <= rates.min() <= rates.max() <= max(start, end) * 1.001
    assert list(rates) == sorted(rates, reverse=start > end)
    times = arrival_times(num, request_rate=np.inf, burstiness=1e6, seed=0, ramp_up=ramp)
    assert np.diff(times) == pytest.approx(1 / rates[1:], rel=0.05)  # nearly even arrivals


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9)), max_size=5), st.data())
def test_events_survive_any_way_of_cutting_them(events, data):
    stream = "".join(f"data: {json.dumps(e, ensure_ascii=False)}\n\n" for e in events)
    stream = (stream + "data: [DONE]\n\n").encode()
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    async def chunks():
        reader = asyncio.StreamReader()
        for piece in filter(None, pieces):
            reader.feed_data(f"{len(piece):X};x=1\r\n".encode() + piece + b"\r\n")
        reader.feed_data(b"0\r\n\r\n")
        reader.feed_eof()
        body = _body(reader, {"transfer-encoding": "chunked"})
        return [event async for event in _events(body)]

    assert asyncio.run(chunks()) == events


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ndata: [",
        b"HTTP/1.1 200 OK\r\n\r\ndata: {broken\n\n",
        b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "engine died"}}\n\n',
        b"HTTP/1.1 200 OK\r\n\r\ndata: [DONE]\n\n",
        b"HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\nwhy",
    ],
)
def test_an_answer_that_is_broken_is_a_failure_and_no_crash(answer):
    async def ask():
        async def respond(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await Server(f"http://127.0.0.1:{port}").stream("/v1/completions", {})

    assert asyncio.run(ask()).error
