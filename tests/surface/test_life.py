"""From loading to the last answer: probes, drains, signals, engines that die (semantics 7)."""

import json
import os
import select
import signal
import subprocess
import threading

import openai
import pytest


def stream_of(server, **fields):
    """A stream of the official client, begun."""
    client = server.client()
    return client.completions.create(model="fake", prompt="abc", stream=True, **fields)


def begun(server, num_streams, **fields):
    server.engine.pause()
    streams = [stream_of(server, **fields) for _ in range(num_streams)]
    server.engine.wait_for_live(num_streams)
    return streams


def children_of(pid):
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    direct = [int(line) for line in listing.stdout.split()]
    return direct + [pid for child in direct for pid in children_of(child)]


def wait_gone(pids):
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([handle], [], [], 60)[0], f"{pid} lives on"
        os.close(handle)


def test_while_the_model_loads_the_port_answers_and_takes_no_work(start):  # LIFE-1
    with start(wait=False, slow_start=True) as server:
        server.wait_listening()
        assert server.get("/livez").status == 200
        for path in ("/readyz", "/health"):
            answer = server.get(path)
            assert answer.error["type"] == "ServiceUnavailableError"
        refused = server.complete()
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert server.get("/v1/models").status == 503
        server.finish_start()
        server.wait_ready()
        assert server.complete(max_tokens=1).status == 200


def in_thread(work):
    """Start `work`; its results go into the list."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def test_a_signal_aborts_what_runs_when_there_is_no_time(start, tmp_path):  # LIFE-4
    with start(environment={"TMPDIR": str(tmp_path)}) as server:
        (stream,) = begun(server, 1, max_tokens=100)
        server.engine.advance(1)
        assert next(stream).choices[0].text == "a"
        plain, answers = in_thread(lambda: server.complete(max_tokens=9))
        server.engine.wait_for_live(2)
        raw, streams = in_thread(lambda: server.complete(max_tokens=9, stream=True, n=2))
        server.engine.wait_for_live(4)
        children = children_of(server.process.pid)
        assert children

        server.process.terminate()

        assert list(stream)[-1].choices[0].finish_reason == "abort"
        plain.join(60)
        raw.join(60)
        assert server.process.wait(60) == 0
        wait_gone(children)
    assert answers[0].error["type"] == "ServiceUnavailableError"
    *chunks, end = streams[0].events
    assert end == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert sorted((c["index"], c["finish_reason"]) for c in choices) == [(0, "abort"), (1, "abort")]
    assert list(tmp_path.iterdir()) == []


def test_a_drain_lets_what_runs_end_and_refuses_the_rest(start):  # LIFE-1, LIFE-4
    with start(shutdown_timeout=60) as server:
        streams = begun(server, 8, max_tokens=5)
        server.process.send_signal(signal.SIGINT)
        wait_draining(server)
        assert server.get("/livez").status == 200
        assert server.get("/health").status == 200
        refused = server.complete()
        assert refused.error["type"] == "ServiceUnavailableError"
        assert int(refused.headers["retry-after"]) >= 1
        server.engine.release()
        for stream in streams:
            chunks = list(stream)
            assert "".join(chunk.choices[0].text for chunk in chunks) == "abcab"
            assert chunks[-1].choices[0].finish_reason == "length"
        assert server.process.wait(60) == 0


def wait_draining(server):
    while server.get("/readyz").status == 200:
        pass


def test_a_drain_has_an_end(start):  # LIFE-4
    with start(shutdown_timeout=0.3) as server:
        (stream,) = begun(server, 1, max_tokens=100)
        server.process.terminate()
        assert list(stream)[-1].choices[0].finish_reason == "abort"
        assert server.process.wait(60) == 0


def test_a_second_signal_does_not_wait(start):  # LIFE-4
    with start(shutdown_timeout=300) as server:
        (stream,) = begun(server, 1, max_tokens=100)
        server.process.terminate()
        wait_draining(server)
        server.process.terminate()
        assert list(stream)[-1].choices[0].finish_reason == "abort"
        assert server.process.wait(60) == 0


def test_an_engine_that_stops_or_dies_is_seen_and_comes_back(start, tmp_path):
    # LIFE-1, ERR-2, EN-28
    with start(environment={"TMPDIR": str(tmp_path)}) as server:
        (stream,) = begun(server, 1, max_tokens=1000)
        pid = server.engine.state()["pid"]
        os.kill(pid, signal.SIGSTOP)
        while server.get("/readyz").status == 200:
            pass
        for path in ("/livez", "/readyz", "/health"):
            assert server.get(path).error["type"] == "ServiceUnavailableError"
        assert server.complete().status == 503
        with pytest.raises(openai.APIError, match="engine"):
            list(stream)
        os.kill(pid, signal.SIGCONT)
        server.wait_ready()
        server.engine.wait_for_live(0)  # EN: it works for nobody

        streams = begun(server, 16, max_tokens=1000)
        plain, answers = in_thread(lambda: server.complete(max_tokens=100))
        server.engine.wait_for_live(17)
        server.get("/metrics")  # what the engine answers after it took the request
        server.engine.kill()
        for stream in streams:
            with pytest.raises(openai.APIError, match="engine"):
                list(stream)
        plain.join(60)
        assert answers[0].error["type"] == "InternalServerError"
        if server.face == "pytriton":  # it ends where the others begin anew
            assert server.process.wait(60) != 0
            return
        server.wait_ready()
        assert server.complete(max_tokens=3).json["choices"][0]["text"] == "abc"

        begun(server, 4, max_tokens=1000)
        children = children_of(server.process.pid)
        server.process.kill()
        server.process.wait(60)
        wait_gone(children)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_cannot_start_ends_the_server(start):
    with start(engine={"device": "none"}, wait=False) as server:
        assert server.process.wait(60) == 1
        assert "the device 'none' cannot run anything" in server.log.read_text()


def test_a_port_in_use_is_told_before_anything_loads(start, server):  # EN-32
    with start(port=server.port, wait=False) as second:
        assert second.process.wait(60) == 1
        assert str(server.port) in second.log.read_text()
