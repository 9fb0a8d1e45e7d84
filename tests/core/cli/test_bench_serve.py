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
from pagedcore.cli.bench.load import arrival_times, random_requests
from pagedcore.cli.bench.metrics import summary
from pagedcore.errors import ConfigError


class Handler(BaseHTTPRequestHandler):
    """Answers as an OpenAI server does; the test's `Site` decides what and counts."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
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
    _, result = bench("--goodput", "ttft:60000", "--goodput", "e2el:0.000001")
    assert result["request_goodput"] == 0


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
        ("--request-rate", "0"),
        ("--burstiness", "-1"),
        ("--random-range-ratio", "1"),
    ],
)
def test_a_value_without_meaning_is_refused_before_anything_is_sent(site, bench, flag, value):
    assert bench(flag, value) == (1, None)
    assert site.bodies == []


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


@given(st.integers(1, 50), st.integers(0, 40), st.floats(0, 0.9), st.integers(0, 5))
def test_random_requests_have_the_lengths_that_were_asked_for(num, length, ratio, prefix):
    asked = dict(input_len=length, output_len=7, range_ratio=ratio, prefix_len=prefix)
    if length + prefix < 1:
        with pytest.raises(ConfigError):
            random_requests(num, **asked, vocab_size=9, seed=3)
        return
    requests = random_requests(num, **asked, vocab_size=9, seed=3)
    assert requests == random_requests(num, **asked, vocab_size=9, seed=3)
    assert len(requests) == num
    for request in requests:
        own = len(request.prompt_token_ids) - prefix
        assert length * (1 - ratio) - 1 <= own <= length * (1 + ratio) + 1
        assert request.prompt_token_ids[:prefix] == requests[0].prompt_token_ids[:prefix]
        assert all(0 <= token < 9 for token in request.prompt_token_ids)
        assert 1 <= request.output_len <= 7 * (1 + ratio) + 1


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
