"""Errors as clients see them: OpenAI's body, and its client's own classes (semantics 5.4)."""

import json

import openai
import pytest


def test_a_bad_value_is_the_clients_bad_request_error(client):  # ERR-5
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="fake", prompt="abc", max_tokens=0)
    error = raised.value
    assert (error.status_code, error.code) == (400, "400")  # the client makes it a text
    assert (error.param, error.type) == ("max_tokens", "BadRequestError")
    assert "max_tokens" in error.message


def test_an_unknown_model_is_the_clients_not_found_error(client):  # HTTP-4, ERR-5
    with pytest.raises(openai.NotFoundError, match=r"The model `other` does not exist\."):
        client.completions.create(model="other", prompt="abc")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_what_is_not_built_is_501(client):  # HTTP-2
    with pytest.raises(openai.APIStatusError) as raised:
        client.post("/rerank", body={"query": "x", "documents": ["y"]}, cast_to=object)
    assert (raised.value.status_code, raised.value.type) == (501, "NotImplementedError")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json": {}}},
        {"guided_json": {}},
        {"thinking_token_budget": 3},
    ],
)
def test_constraints_that_are_not_built_are_refused_and_never_dropped(server, fields):
    assert server.complete(**fields).error["code"] == 501


def test_a_failing_request_is_the_clients_internal_server_error(server, client):  # STOP-6, ERR-4
    server.engine.pause()
    server.engine.fail_running("NaN logits")
    server.engine.release()
    with pytest.raises(openai.InternalServerError, match="NaN logits"):
        client.completions.create(model="fake", prompt="abc")
    assert server.complete(max_tokens=1).status == 200


def test_a_failing_request_ends_its_stream_with_an_error_event(server, client):  # STREAM-6
    server.engine.pause()
    stream = client.completions.create(
        model="fake", prompt="abc", stream=True, stream_options={"include_usage": True}
    )
    server.engine.advance(1)
    assert next(stream).choices[0].text == "a"
    server.engine.fail_running("NaN logits")
    server.engine.release()
    with pytest.raises(openai.APIError, match="NaN logits"):
        list(stream)


def test_after_an_error_event_comes_done_and_no_usage(server):  # STREAM-6
    server.engine.pause()
    server.engine.fail_running("NaN logits")
    server.engine.release()
    answer = server.complete(stream=True, stream_options={"include_usage": True})
    *_, error, end = answer.events
    assert json.loads(error)["error"]["code"] == 500
    assert end == "[DONE]"


def test_a_full_queue_is_503_with_a_time_to_come_back(small):  # QUEUE-1, STREAM-6
    small.engine.pause()
    with small.client() as client:
        running = [
            client.completions.create(model="fake", prompt=["a", "b"], n=2, stream=True)
            for _ in range(2)
        ]
        small.engine.wait_for_live(8)
        for stream in (False, True):
            refused = small.complete(stream=stream)
            assert refused.error["type"] == "ServiceUnavailableError"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model="fake", prompt="abc")
        assert raised.value.status_code == 503
        for stream in running:
            stream.close()


def test_the_choices_of_a_prompt_are_taken_whole_or_not_at_all(small):  # QUEUE-1, EN-8
    small.engine.pause()
    with small.client() as client:
        running = client.completions.create(model="fake", prompt=["a"] * 3, n=2, stream=True)
        small.engine.wait_for_live(6)
        assert small.complete(n=3).status == 503
        assert small.engine.state()["live"] == 6
        running.close()


def test_unknown_paths_and_wrong_methods_have_the_same_body(server):  # HTTP-2
    assert server.get("/nowhere").error["type"] == "NotFoundError"
    assert server.request("POST", "/v1/nowhere", {}).error["code"] == 404
    wrong = server.get("/v1/completions")
    assert wrong.error["type"] == "MethodNotAllowedError"
    assert wrong.headers["allow"] == "POST"
    assert server.request("DELETE", "/v1/models").error["code"] == 405


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "nonsense"])
def test_a_body_that_says_it_is_not_json_is_415(server, kind):  # REQ-5
    body = b'{"prompt": "abc"}'
    answer = server.request("POST", "/v1/completions", body, {"content-type": kind})
    assert answer.error["type"] == "UnsupportedMediaTypeError"


@pytest.mark.parametrize("kind", [None, "application/json", "application/json; charset=utf-8"])
def test_a_body_without_a_type_is_json(server, kind):  # REQ-5
    body = b'{"prompt": "abc", "max_tokens": 1}'
    headers = {} if kind is None else {"content-type": kind}
    assert server.request("POST", "/v1/completions", body, headers).status == 200


def test_a_model_without_a_template_cannot_chat(strict):  # ERR-2
    assert strict.chat("hi").error["type"] == "UnprocessableEntityError"
    assert strict.complete(max_tokens=1).status == 200


def test_every_error_has_a_request_id(server):  # STREAM-1
    for path in ("/nowhere", "/v1/models/other"):
        answer = server.get(path, **{"x-request-id": "mine"})
        assert answer.headers["x-request-id"] == "mine"
