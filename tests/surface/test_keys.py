"""Keys: every route is behind them, whatever the path looks like (semantics AUTH-1..3)."""

import http.client
import re

import openai
import pytest

KEYS = ["first-key", "second-key"]
EXEMPT = {"/health", "/livez", "/readyz", "/ping"}
ROUTES = [
    ("GET", "/"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/resp_1"),
    ("POST", "/v1/responses/resp_1/cancel"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/invocations"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/load"),
    ("GET", "/health_generate"),
    ("GET", "/openapi.json"),
    ("POST", "/v1/messages"),
    ("POST", "/generate"),
    ("POST", "/sleep"),
    ("GET", "/nowhere"),
]


@pytest.mark.hostile("IN-37", "IN-38")
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key(locked, method, path):  # AUTH-1
    body = {"prompt": "abc"} if method == "POST" else None
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
        answer = locked.request(method, path, body, headers)
        assert answer.error["type"] == "authentication_error"
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    right = locked.request(method, path, body, {"authorization": f"Bearer {KEYS[0]}"})
    assert right.status != 401


@pytest.mark.hostile("IN-38")
def test_no_route_of_the_document_was_forgotten(locked):  # AUTH-1
    document = locked.get("/openapi.json", authorization=f"Bearer {KEYS[0]}").json
    for path, operations in document["paths"].items():
        for method in operations:
            status = locked.request(method.upper(), re.sub(r"\{\w+\}", "x", path)).status
            assert (status == 401) == (path not in EXEMPT), f"{method} {path}: {status}"


@pytest.mark.parametrize("path", sorted(EXEMPT))
def test_probes_need_none(locked, path):  # AUTH-1
    assert locked.get(path).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer second-key"},
        {"authorization": "bearer second-key"},
        {"x-api-key": "second-key"},
    ],
)
def test_any_of_the_keys_opens_in_either_header(locked, headers):
    assert locked.get("/v1/models", **headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "second-key"},
        {"authorization": "Basic second-key"},
        {"authorization": "Bearer second-keyx"},
        {"authorization": "Bearer second-ke"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer wrong", "x-api-key": "second-key"},
        {"cookie": "api_key=second-key"},
    ],
)
def test_nothing_else_does(locked, headers):
    assert locked.get("/v1/models", **headers).status == 401


@pytest.mark.hostile("IN-37")
@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1/../v1/models",
        "/health/../v1/models",
        "/v1/%6dodels",
        "/%2e/v1/models",
        "/v1/models?path=/health",
        "/v1/models#/health",
        "/health/",
        "/HEALTH",
        "/health%00",
        "/v1/models;/health",
    ],
)
@pytest.mark.parametrize("host", ["x", "127.0.0.1/health?", "x/health#", "", "health"])
def test_no_spelling_of_a_path_or_host_goes_around_the_keys(locked, path, host):  # AUTH-2, IN-37
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    status = locked.raw(request).split(b" ", 2)[1]
    assert status in (b"401", b"400")


def test_the_answer_comes_before_the_body_is_read(locked):  # AUTH-1
    data = locked.raw(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{"
    )
    assert data.startswith(b"HTTP/1.1 401 ")


def test_the_official_client_raises_its_class(locked):  # ERR-5
    with locked.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with locked.client(api_key=KEYS[1]) as client:
        assert client.completions.create(model="fake", prompt="abc", max_tokens=1).choices


def test_keys_come_from_a_file_and_the_environment_too(start, tmp_path):
    path = tmp_path / "keys"
    path.write_text("# of the office\nfrom-file\n\nalso-from-file\n")
    environment = {"PAGEDCORE_API_KEY": "from-environment,another"}
    with start(api_key_file=str(path), environment=environment) as server:
        for key in ("from-file", "also-from-file", "from-environment", "another"):
            assert server.get("/v1/models", authorization=f"Bearer {key}").status == 200
        for key in ("# of the office", "", "from-environment,another"):
            assert server.get("/v1/models", authorization=f"Bearer {key}").status == 401
        log = server.log.read_text()
        assert not any(key in log for key in ("from-file", "from-environment"))  # AUTH-3


def test_a_body_that_is_sent_first_still_gets_its_401(locked):
    connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=60)
    connection.request("POST", "/v1/completions", b"x" * (4 << 20))
    assert connection.getresponse().status == 401
    connection.close()
