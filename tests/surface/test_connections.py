"""Raw bytes: pipelines, lies about lengths, connections that are half there (reliability 1b)."""

import pytest

GOOD = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "abc", "max_tokens": 2}'


def statuses(data):
    """The statuses of the answers in `data`."""
    return [int(part.split(b" ")[0]) for part in data.split(b"HTTP/1.1 ")[1:]]


def test_pipelined_requests_are_answered_in_order(server):
    post = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    data = server.raw(GOOD + post + GOOD + post + LAST)
    assert statuses(data) == [200] * 5
    assert data.count(b'"version"') == 3
    assert data.index(b'"version"') < data.index(b'"text":"ab"')


def test_a_bad_request_in_a_pipeline_spoils_no_good_answer(server):
    data = server.raw(GOOD + b"NONSENSE\r\n\r\n")
    assert statuses(data) == [200]


@pytest.mark.hostile("IN-41")
@pytest.mark.parametrize(
    "data",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /version HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /version HTTP/1.1\r\nBad Header: x\r\n\r\n",
        b"GET /version HTTP/1.1\r\nX: a\x00b\r\nHost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        POST + b"Content-Length: abc\r\n\r\n" + BODY,
        POST + b"Content-Length: -1\r\n\r\n" + BODY,
        POST + b"Content-Length: \r\n\r\n" + BODY,
        POST + b"Content-Length: 99999999999999999999\r\n\r\n" + BODY,
        POST + b"Content-Length: 10\r\nContent-Length: 11\r\n\r\n" + BODY,
        POST + b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcXX0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nabc",
        POST + b"Transfer-Encoding: gzip\r\n\r\nabc",
    ],
)
def test_bytes_that_are_no_request_are_400_in_the_same_shape(server, data):  # ERR-1
    answer = server.raw(data)
    assert statuses(answer) in ([400], [404], [501])
    assert b'{"error": {"message": ' in answer
    assert server.get("/version").status == 200


@pytest.mark.hostile("IN-35")
def test_a_body_shorter_than_its_length_is_never_run(server):
    added = server.engine.state()["added"]
    with server.connect() as link:
        link.sendall(POST + b"Content-Length: %d\r\n\r\n" % (len(BODY) + 5) + BODY)
    assert server.get("/version").status == 200
    assert server.engine.state()["added"] == added


@pytest.mark.hostile("IN-35")
def test_a_body_longer_than_its_length_is_cut(server):
    answer = server.raw(POST + b"Content-Length: %d\r\n\r\n" % (len(BODY) - 3) + BODY)
    assert statuses(answer)[0] == 400


@pytest.mark.hostile("IN-33")
@pytest.mark.parametrize(
    "fields",
    [
        b"X-Big: " + b"x" * (1 << 20) + b"\r\n",
        b"".join(b"X-%d: v\r\n" % i for i in range(20_000)),
        b"X" * 100_000 + b": v\r\n",
        b"Cookie: " + b"a=b; " * 20_000 + b"\r\n",
    ],
)
def test_giant_headers_are_431_and_closed(server, fields):
    with server.connect() as link:
        try:
            link.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n")
            data = link.recv(1 << 16)
        except ConnectionError:
            data = b"HTTP/1.1 431 "  # it did not wait for the end
    assert statuses(data) == [431]


@pytest.mark.hostile("IN-33")
def test_a_giant_path_is_refused(server):
    with server.connect() as link:
        try:
            link.sendall(b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            data = link.recv(1 << 16)
        except ConnectionError:
            data = b"HTTP/1.1 431 "
    assert statuses(data)[0] in (400, 404, 414, 431)
    assert len(data) < 5000


@pytest.mark.hostile("IN-34")
def test_a_body_of_a_million_chunks_is_refused(server):
    chunks = b"1\r\n \r\n" * 70_000
    with server.connect() as link:
        try:
            link.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
            data = link.recv(1 << 16)
        except ConnectionError:
            data = b"HTTP/1.1 400 "
    assert statuses(data) == [400]


@pytest.mark.hostile("IN-39")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"G",
        b"GET /version HTTP/1.1\r\nHo",
        POST + b"Content-Length: 100\r\n\r\n",
        POST + b"Content-Length: 100\r\n\r\n{",
        POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
)
def test_a_connection_that_closes_anywhere_is_no_error(server, data):
    log_before = server.log.read_text().count("Traceback")
    with server.connect() as link:
        link.sendall(data)
    assert server.complete(max_tokens=1).status == 200
    assert server.log.read_text().count("Traceback") == log_before


@pytest.mark.hostile("IN-39")
def test_a_connection_that_is_reset_is_no_error(server):
    import socket
    import struct

    link = server.connect()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
    link.close()
    assert server.complete(max_tokens=1).status == 200


@pytest.mark.hostile("IN-40")
def test_many_half_open_connections_hold_nobody_up(server):
    links = [server.connect() for _ in range(300)]
    for i, link in enumerate(links):
        link.sendall((b"GET /ver", POST + b"Content-Length: 9\r\n\r\n{", b"")[i % 3])
    assert server.complete(stream=True, max_tokens=20).chunks
    assert server.get("/health").status == 200
    for link in links:
        link.close()


@pytest.mark.hostile("IN-42")
def test_upgrades_are_declined(server):
    data = server.raw(
        b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert b"101 Switching" not in data


def test_a_client_that_waits_to_be_told_to_go_on_is_told(server):
    with server.connect() as link:
        head = POST + b"Expect: 100-continue\r\nConnection: close\r\n"
        link.sendall(head + b"Content-Length: %d\r\n\r\n" % len(BODY))
        assert link.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        link.sendall(BODY)
        data = b""
        while piece := link.recv(1 << 16):
            data += piece
    assert statuses(data) == [200]
