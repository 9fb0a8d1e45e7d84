"""`pagedcore serve --server litserve`: what clients see, whatever LitServe would have done."""

import contextlib
import json
import os
import socket
import stat
from pathlib import Path

import pytest

# What stock LitServe answers to these is in the defects' list: 500, or 200 and garbage.
BAD = [
    {"n": 0},
    {"n": 2000},
    {"temperature": float("nan")},
    {"seed": 2**70},
    {"max_tokens": "x"},
    {"prompt": ""},
    {"prompt": "\ud800"},
    {"logit_bias": {"x": 1}},
]


def read_events(answer):
    """The data of a stream's events."""
    return [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]


def test_text_goes_in_and_text_comes_out(served):
    status, answer = served.complete(max_tokens=7)
    assert status == 200
    assert answer["choices"][0]["text"] == "abcabca"


def test_all_api_servers_share_one_batch(served):
    served.engine.pause()
    with contextlib.ExitStack() as stack:
        streams = []
        for _ in range(16):
            connection, answer = served.stream(max_tokens=5)
            stack.enter_context(contextlib.closing(connection))
            streams.append(answer)
        served.engine.wait_for_live(16)
        served.engine.release()
        for answer in streams:
            *chunks, end = read_events(answer)
            assert end == "[DONE]"
            assert "".join(json.loads(c)["choices"][0]["text"] for c in chunks) == "abcab"


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}])
def test_a_client_that_leaves_takes_its_work_with_it(served, body):  # D16
    before = served.engine.state()["aborted"]
    served.engine.pause()
    with served.connect() as link:
        data = json.dumps({"prompt": "abc", "max_tokens": 1000, **body}).encode()
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(data) + data
        )
        served.engine.wait_for_live(body.get("n", 1))
    served.engine.wait_for_live(0)
    assert served.engine.state()["aborted"] == before + body.get("n", 1)


@pytest.mark.parametrize("body", BAD, ids=[json.dumps(body) for body in BAD])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_refused_before_the_engine_hears_of_it(served, body, stream):  # D18, D20
    before = served.engine.state()["added"]
    status, answer = served.complete(**body, stream=stream)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert served.engine.state()["added"] == before
    assert served.complete(max_tokens=1)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/no-such-thing", 404),
        ("GET", "/info", 404),  # LitServe's own
        ("GET", "/docs", 404),
        ("POST", "/predict", 404),
        ("GET", "/v1/completions", 405),
    ],
)
def test_the_http_layers_errors_have_our_body(served, method, path, expected):  # D19
    status, _, body = served.request(method, path)
    assert status == expected
    assert json.loads(body)["error"]["code"] == expected


def test_a_later_error_is_an_event_and_ends_the_stream(served):  # D20
    served.engine.pause()
    connection, answer = served.stream(max_tokens=1000)
    with contextlib.closing(connection):
        served.engine.wait_for_live(1)
        served.engine.fail_running("no numbers came out")
        served.engine.release()
        *_, error, end = read_events(answer)
    assert end == "[DONE]"
    assert "no numbers came out" in json.loads(error)["error"]["message"]


def resident_bytes(pids):
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def test_readers_that_do_not_read_cost_little_and_harm_nobody(served):  # D24
    children, before = served.tree(), served.engine.state()["aborted"]
    memory = resident_bytes(children)
    body = {"prompt": "abc", "max_tokens": 10**6, "stream": True, "logprobs": 20}
    data = json.dumps(body).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(data)
    )
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            link = stack.enter_context(socket.socket())
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.connect(("127.0.0.1", served.port))
            link.sendall(head + data)
        connection, answer = served.stream(max_tokens=50)
        with contextlib.closing(connection):
            *_, last, end = read_events(answer)
        assert (json.loads(last)["choices"][0]["finish_reason"], end) == ("length", "[DONE]")
        while served.engine.state()["aborted"] < before + 8:
            pass
        assert resident_bytes(children) - memory < 100 << 20


@pytest.fixture(scope="module")
def guarded(launch):
    """A server with a key and tight limits."""
    limits = {"max_request_bytes": 1000, "http_read_timeout": 0.5}
    with launch(api_key=["right"], **limits) as program:
        program.wait_for(200)
        yield program


def test_a_wrong_key_is_refused_before_the_body_is_there(guarded):  # D28
    with guarded.connect() as link:
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer wrong\r\n"
            b'content-length: 1000\r\n\r\n{"prompt'
        )
        assert link.recv(4096).startswith(b"HTTP/1.1 401 ")
    headers = {"authorization": "Bearer right"}
    body = {"prompt": "abc", "max_tokens": 1}
    assert guarded.request("POST", "/v1/completions", body, headers)[0] == 200
    assert guarded.get("/info") == 401
    assert "right" not in guarded.log


def test_a_body_above_the_limit_is_413(guarded):  # D18, D19
    headers = {"authorization": "Bearer right"}
    status, _, body = guarded.request(
        "POST", "/v1/completions", {"prompt": "x" * 2000, "max_tokens": 1}, headers
    )
    assert (status, json.loads(body)["error"]["code"]) == (413, 413)


def test_a_request_that_never_comes_is_not_waited_for(guarded):  # D30
    with guarded.connect() as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le")
        assert half.recv(4096) == b""


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"GET /livez HTTP/1.1\r\nhost: x\r\nx-big: " + b"x" * (65 << 10) + b"\r\n\r\n", b"431"),
        (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
            b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            b"400",
        ),
    ],
    ids=["64-kilobytes-of-headers", "two-lengths"],
)
def test_bytes_that_are_no_request_are_answered(served, request_bytes, expected):  # D30
    with served.connect() as link:
        link.sendall(request_bytes)
        assert link.recv(4096).startswith(b"HTTP/1.1 %b " % expected)
    assert served.complete(max_tokens=1)[0] == 200


def test_no_front_end_loads_torch(served):
    worker = served.worker()
    for pid in (served.process.pid, *served.tree()):
        if pid != worker:
            with open(f"/proc/{pid}/maps") as maps:
                assert "libtorch" not in maps.read()


def test_only_the_owner_may_enter_the_sockets_folder(served):  # D27
    (folder,) = (served.scratch / "tmp").glob("pagedcore-*")
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
