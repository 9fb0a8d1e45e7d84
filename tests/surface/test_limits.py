"""Every row of LIMIT-1: the limit itself is accepted, one more is refused."""

import pytest


@pytest.mark.parametrize(
    ("at_limit", "above", "param"),
    [
        ({"n": 3}, {"n": 4}, "n"),
        ({"prompt": ["a"] * 4}, {"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": [[97]] * 4}, {"prompt": [[97]] * 5}, "prompt"),
        ({"stop": ["x", "y"]}, {"stop": ["x", "y", "z"]}, "stop"),
        ({"bad_words": ["x", "y"]}, {"bad_words": ["x", "y", "z"]}, "bad_words"),
        ({"logit_bias": {"1": 0, "2": 0}}, {"logit_bias": dict.fromkeys("123", 0)}, "logit_bias"),
        ({"logprobs": 3}, {"logprobs": 4}, "logprobs"),
        ({"prompt_logprobs": 3}, {"prompt_logprobs": 4}, "prompt_logprobs"),
    ],
)
def test_a_field_may_be_at_its_limit_and_not_above(small, at_limit, above, param):
    assert small.complete(**{"max_tokens": 1, **at_limit}).status == 200
    error = small.complete(**{"max_tokens": 1, **above}).error
    assert (error["code"], error["param"]) == (400, param)
    assert any(character.isdigit() for character in error["message"])


def test_top_logprobs_have_the_same_limit(small):
    assert small.chat("hi", logprobs=True, top_logprobs=3).status == 200
    assert small.chat("hi", logprobs=True, top_logprobs=4).status == 400


def body_of(num_bytes):
    body = b'{"prompt": "abc", "max_tokens": 1}'
    return body + b" " * (num_bytes - len(body))


@pytest.mark.hostile("IN-35")
def test_a_body_may_be_at_its_limit_and_not_above(small):
    assert small.request("POST", "/v1/completions", body_of(4000)).status == 200
    answer = small.request("POST", "/v1/completions", body_of(4001))
    assert answer.error["type"] == "RequestTooLargeError"
    assert answer.headers["connection"] == "close"


@pytest.mark.hostile("IN-34")
def test_a_chunked_body_is_counted_while_it_is_read(small):
    def chunked(body, size=1000):
        pieces = [body[i : i + size] for i in range(0, len(body), size)]
        data = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        return (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Connection: close\r\n\r\n" + data + b"0\r\n\r\n"
        )

    assert small.raw(chunked(body_of(4000))).startswith(b"HTTP/1.1 200 ")
    assert small.raw(chunked(body_of(4001))).startswith(b"HTTP/1.1 413 ")
    assert small.raw(chunked(body_of(100), 5)).startswith(b"HTTP/1.1 200 ")
    assert b"chunks" in small.raw(chunked(body_of(100), 4))


def test_a_body_that_is_far_too_large_is_refused_and_its_sender_hears_it(small):
    answer = small.request("POST", "/v1/completions", b"x" * (8 << 20))
    assert answer.status == 413


@pytest.mark.hostile("IN-33")
def test_headers_may_be_at_their_limits_and_not_above(small):
    few = {f"x-{i}": "v" for i in range(17)}  # and Host, Accept-Encoding, X-Pad
    fits = {**few, "x-pad": "p" * 1700}
    assert small.get("/v1/models", **fits).status == 200
    assert small.get("/v1/models", **fits, **{"x-more": "v"}).error["code"] == 431
    large = small.get("/v1/models", **{"x-pad": "p" * 2000})
    assert large.error["type"] == "RequestHeaderFieldsTooLargeError"
    assert large.headers["connection"] == "close"


@pytest.mark.hostile("IN-16")
def test_brackets_may_be_at_their_limit_and_not_above(small):
    nested = {"a": 1}
    for _ in range(8):
        nested = {"a": nested}
    assert small.complete(max_tokens=1, metadata=nested).status == 200
    assert small.complete(max_tokens=1, metadata={"a": nested}).error["code"] == 400


@pytest.mark.hostile("IN-24")
def test_values_may_be_at_their_limit_and_not_above(small):
    def body(count):
        return b'{"prompt": "abc", "max_tokens": 1, "metadata": {"a": [%s]}}' % b",".join(
            [b"1"] * count
        )

    assert small.request("POST", "/v1/completions", body(49)).status == 200
    assert small.request("POST", "/v1/completions", body(50)).error["code"] == 400


@pytest.mark.hostile("IN-40")
def test_a_slow_body_is_408_and_closes_the_connection(small):
    with small.connect() as link:
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        data = b""
        while piece := link.recv(4096):
            data += piece
    assert data.startswith(b"HTTP/1.1 408 ")
    assert b'"RequestTimeoutError"' in data
    assert b"connection: close" in data


@pytest.mark.hostile("IN-40")
@pytest.mark.parametrize("beginning", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_slow_headers_are_closed_without_an_answer(small, beginning):
    assert small.raw(beginning) == b""


def test_a_kept_connections_next_headers_have_a_deadline_too(small):
    good = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    data = small.raw(good + b"GET /ver")
    assert data.count(b"HTTP/1.1") == 1


def test_others_are_served_while_slow_ones_are_waited_for(small):  # LIMIT-2
    links = [small.connect() for _ in range(50)]
    for link in links:
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
    assert small.get("/health").status == 200
    assert small.complete(max_tokens=1).status == 200
    for link in links:
        link.close()


def test_requests_of_one_key_have_a_limit(locked):  # QUEUE-4
    locked.engine.pause()
    first, second = ({"authorization": f"Bearer {key}-key"} for key in ("first", "second"))
    with locked.client(api_key="first-key") as client:
        streams = [
            client.completions.create(model="fake", prompt="abc", stream=True) for _ in range(2)
        ]
        refused = locked.complete(headers=first)
        assert refused.error["type"] == "RateLimitError"
        assert int(refused.headers["retry-after"]) >= 1
        locked.engine.release()
        assert locked.complete(headers=second, max_tokens=1).status == 200
        for stream in streams:
            list(stream)
    assert locked.complete(headers=first, max_tokens=1).status == 200


def test_requests_of_one_key_have_a_rate(shared):
    server = shared(max_requests_per_minute=2, api_key=["one", "two"])
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    assert [server.complete(headers=one, max_tokens=1).status for _ in range(3)] == [200, 200, 429]
    assert 1 <= int(server.complete(headers=one).headers["retry-after"]) <= 60
    assert server.complete(headers=two, max_tokens=1).status == 200
    assert server.get("/v1/models", **one).status == 200
