"""Server-sent events: usage, intervals, keep-alives, readers that leave or do not read."""

import contextlib
import json
import socket

import pytest

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def post(**fields):
    body = json.dumps({"prompt": "abc", **fields}).encode()
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_the_media_type_is_that_of_events_and_the_last_one_is_done(server):  # STREAM-7
    answer = server.complete(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.events[-1] == "[DONE]"


def test_usage_comes_in_one_more_chunk_without_choices(client):  # USAGE-1
    chunks = list(
        client.completions.create(
            model="fake",
            prompt="abc",
            max_tokens=5,
            n=2,
            seed=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 10)
    assert {chunk.usage for chunk in chunks[:-1]} == {None}


def test_every_chunk_but_the_last_says_that_usage_is_null(server):  # USAGE-1
    chunks = server.complete(stream=True, stream_options={"include_usage": True}).chunks
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert not any("usage" in chunk for chunk in server.complete(stream=True).chunks)


def test_continuous_usage_counts_up(server):  # USAGE-2
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.complete(stream=True, max_tokens=6, stream_options=options).chunks
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3}


def test_usage_can_be_forced_into_every_stream(generous):  # USAGE-2
    prompt = "p" * 33
    generous.complete(prompt)
    chunks = generous.complete(prompt, stream=True).chunks
    assert all(chunk["usage"]["prompt_tokens"] == 33 for chunk in chunks)
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}  # USAGE-3


def test_an_interval_joins_tokens_after_the_first(generous):  # STREAM-4
    generous.engine.pause()
    with generous.client() as client:
        stream = client.completions.create(model="fake", prompt="abc", max_tokens=9, stream=True)
        generous.engine.advance(1)
        texts = [next(stream).choices[0].text]
        for _ in range(2):
            generous.engine.advance(3)
            texts.append(next(stream).choices[0].text)
        generous.engine.release()
        texts += [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert texts == ["a", "bca", "bca", "bc"]


def test_a_silent_stream_gets_comments(generous):  # STREAM-7
    generous.engine.pause()
    with generous.connect() as link:
        link.sendall(post(stream=True))
        seen = b""
        while b": keep-alive\n\n" not in seen:
            seen += link.recv(4096)
    assert b"data:" not in seen


def test_a_held_back_text_makes_no_chunk(server):  # STREAM-3, DETOK-3
    server.engine.pause()
    with server.client() as client:
        stream = client.completions.create(
            model="fake", prompt="abc", max_tokens=3, stream=True, stop="zz"
        )
        server.engine.advance(2)  # "a" may be the first half of no stop string any more
        texts = [next(stream).choices[0].text]
        server.engine.advance(1)
        texts += [chunk.choices[0].text for chunk in stream]
    assert texts == ["a", "bc"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 8])
def test_a_reader_that_leaves_ends_its_work(server, stream, n):  # CANCEL-1, CANCEL-3, EN-7, EN-9
    before = server.engine.state()["aborted"]
    server.engine.pause()
    with server.connect() as link:
        link.sendall(post(stream=stream, n=n, max_tokens=1000))
        server.engine.wait_for_live(n)
        server.engine.advance(1)
    server.engine.wait_for_live(0)
    assert server.engine.state()["aborted"] == before + n


def test_a_reader_that_leaves_while_it_waits_in_the_queue_leaves_nothing(small):  # CANCEL-1
    small.engine.pause()
    with small.connect() as first, small.connect() as second:
        first.sendall(post(stream=True, max_tokens=1000))
        small.engine.wait_for_live(1)
        second.sendall(post(stream=True, max_tokens=1000))
        small.engine.wait_for_live(2)
        second.close()
        small.engine.wait_for_live(1)


def test_a_reader_that_does_not_read_is_dropped(generous):  # STREAM-10, EN-24
    before = generous.engine.state()["aborted"]
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", generous.port))
        link.sendall(post(max_tokens=100_000, stream=True, n=2, logprobs=20))
        generous.engine.wait_for_live(2)
        generous.engine.wait_for_live(0)
        assert generous.engine.state()["aborted"] == before + 2
        read_all(link)  # the connection was closed: this ends
    assert generous.complete(max_tokens=1).status == 200


def read_all(link):
    with contextlib.suppress(ConnectionResetError):
        while link.recv(1 << 16):
            pass


def test_a_good_stream_goes_on_beside_one_that_nobody_reads(server):
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with link:
        link.connect(("127.0.0.1", server.port))
        link.sendall(post(max_tokens=4000, stream=True, n=8))
        answer = server.complete(stream=True, max_tokens=100)
        assert len("".join(c["choices"][0]["text"] for c in answer.chunks)) == 100
