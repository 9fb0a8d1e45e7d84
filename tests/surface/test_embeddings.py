"""Vectors and scores over HTTP, as OpenAI's client and those of other servers ask for them."""

import base64
import json
import math

import numpy as np
import openai
import pytest

from pagedcore.pooling import PoolingParams
from pagedcore.testing.fake_engine import fake_vector


def vector_of(prompt, **changes):
    tokens = list(prompt.encode()) if isinstance(prompt, str) else prompt
    params = {"pooling": "last", "normalize": True} | changes
    return fake_vector(tokens, PoolingParams(**params))


def embed(server, value, headers=None, **fields):
    return server.request("POST", "/v1/embeddings", {"input": value, **fields}, headers)


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("abc", ["abc"]),
        (["abc", "héllo"], ["abc", "héllo"]),
        ([1, 2, 300], [[1, 2, 300]]),
        ([[1, 2], [7]], [[1, 2], [7]]),
    ],
)
def test_the_official_client_gets_a_vector_for_each_input(client, value, prompts):  # EMB-1
    answer = client.embeddings.create(model="fake", input=value)  # asks for base64
    assert [item.index for item in answer.data] == list(range(len(prompts)))
    for item, prompt in zip(answer.data, prompts, strict=True):
        assert np.allclose(item.embedding, vector_of(prompt))
    num_tokens = sum(len(p.encode() if isinstance(p, str) else p) for p in prompts)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == num_tokens
    assert (answer.model, answer.object) == ("fake", "list")


def test_both_encodings_hold_the_same_float32(server):  # EMB-1
    floats = embed(server, "abc", encoding_format="float").json["data"][0]["embedding"]
    text = embed(server, "abc", encoding_format="base64").json["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(text), "<f4"), np.float32(floats))
    assert "completion_tokens" not in embed(server, "abc").json["usage"]


def test_a_vector_can_be_cut_pooled_and_left_unscaled(server):  # EMB-1
    cut = embed(server, "abc", dimensions=3).json["data"][0]["embedding"]
    assert np.allclose(cut, vector_of("abc", dimensions=3))
    raw = embed(server, "abc", normalize=False, pooling="mean").json["data"][0]["embedding"]
    assert np.allclose(raw, vector_of("abc", normalize=False))


def test_what_is_too_long_is_refused_or_keeps_its_beginning(server):
    assert embed(server, "x" * 4096).status == 200  # no room for an output is needed
    error = embed(server, ["y", "x" * 4097]).error
    assert (error["code"], error["param"]) == (400, "input")
    assert "4097" in error["message"]
    kept = embed(server, "ab" + "x" * 5000, truncate_prompt_tokens=2).json
    assert kept["usage"]["prompt_tokens"] == 2
    assert np.allclose(kept["data"][0]["embedding"], vector_of("ab"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [[512]]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 9}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": "3"}, "dimensions"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "cache_salt": ""}, "cache_salt"),
        ({"input": "a", "priority": 1}, "priority"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
def test_what_cannot_become_vectors_is_400(server, fields, param):
    error = server.request("POST", "/v1/embeddings", fields).error
    assert (error["code"], error["param"]) == (400, param)


def test_an_unknown_model_and_too_many_inputs_are_refused(server, small):
    assert embed(server, "a", model="other").status == 404
    assert embed(small, ["a"] * 4).status == 200
    assert "at most 4" in embed(small, ["a"] * 5).error["message"]


def test_more_inputs_than_run_or_wait_at_once_are_answered(small):
    """One row and eight places in the queue are enough for a request of any size."""
    values = [[i, i + 1] for i in range(4)]
    data = embed(small, values).json["data"]
    for item, value in zip(data, values, strict=True):
        assert np.allclose(item["embedding"], vector_of(value))


def test_a_client_that_leaves_and_a_deadline_end_the_work(server):  # CANCEL-1
    server.engine.pause()
    before = server.engine.state()["aborted"]
    late = embed(server, ["abc", "d"], headers={"x-request-timeout": "0.2"})
    assert late.error["code"] == 408
    server.engine.wait_for_live(0)
    body = json.dumps({"input": ["abc", "def"]}).encode()
    with server.connect() as link:
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        link.sendall(head.encode() + body)
        server.engine.wait_for_live(2)
    server.engine.wait_for_live(0)
    assert server.engine.state()["aborted"] == before + 4


def test_an_engine_that_fails_on_an_input_is_500(server):
    server.engine.pause()
    server.engine.fail_running("no vector today")
    server.engine.release()
    error = embed(server, ["abc", "def"]).error
    assert (error["code"], error["message"]) == (500, "no vector today")


def test_cached_tokens_and_ignored_fields_are_told(generous):
    embed(generous, "z" * 40)
    answer = embed(generous, "z" * 40, user="me", zebra=1)
    assert answer.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 32
    assert answer.headers["x-pagedcore-ignored-params"] == "user,zebra"


@pytest.fixture(scope="module")
def ranker(start):
    """A model that was made to classify pairs."""
    with start(task="classify") as server:
        yield server


def relevance(query, text):
    scores = PoolingParams(pooling="scores", normalize=False)
    value = fake_vector(list((query + text).encode()), scores)[0]
    return 1 / (1 + math.exp(-value))


def test_documents_come_back_in_the_order_of_their_scores(ranker):
    documents = ["aaaa", {"text": "abcd"}, "aabb"]
    body = {"query": "q", "documents": documents, "top_n": 2}
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        answer = ranker.request("POST", path, body).json
        assert [result["index"] for result in answer["results"]] == [1, 2]
        assert answer["results"][0]["document"] == {"text": "abcd"}
        for result, text in zip(answer["results"], ("abcd", "aabb"), strict=True):
            assert result["relevance_score"] == pytest.approx(relevance("q", text))
        assert answer["usage"]["total_tokens"] == 15
    body["return_documents"] = False
    assert "document" not in ranker.request("POST", "/v1/rerank", body).json["results"][0]


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ("q", "abc", [("q", "abc")]),
        ("q", ["abc", "aaa"], [("q", "abc"), ("q", "aaa")]),
        (["q", "r"], ["abc", "rrr"], [("q", "abc"), ("r", "rrr")]),
    ],
)
def test_pairs_are_scored_one_with_all_or_one_by_one(ranker, first, second, pairs):
    for path in ("/v1/score", "/score"):
        answer = ranker.request("POST", path, {"text_1": first, "text_2": second}).json
        scores = [item["score"] for item in answer["data"]]
        assert scores == pytest.approx([relevance(*pair) for pair in pairs])


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "q"}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": [""]}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": [{"txt": "a"}]}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/score", {"text_1": "q"}, "text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("/v1/score", {"text_1": [1], "text_2": ["c"]}, "text_1"),
    ],
)
def test_what_cannot_be_scored_is_400(ranker, path, fields, param):
    error = ranker.request("POST", path, fields).error
    assert (error["code"], error["param"]) == (400, param)


def test_a_model_that_does_not_generate_says_so_and_is_well(ranker):
    for answer in (ranker.complete(), ranker.chat()):
        assert answer.error["code"] == 400
        assert "cannot generate" in answer.error["message"]
    with ranker.client() as client, pytest.raises(openai.BadRequestError):
        client.completions.create(model="fake", prompt="abc", stream=True)
    assert ranker.get("/health_generate").status == 200
    assert embed(ranker, "abc").status == 200


def test_an_embedding_model_scores_by_the_likeness_of_its_vectors(face, start):
    if face != "asgi":
        pytest.skip("what differs between mounts was seen above")
    with start(task="embed") as server:
        documents = ["abc", "xyz", "abd"]
        body = {"query": "abc", "documents": documents}
        results = server.request("POST", "/v1/rerank", body).json["results"]
        for result in results:
            alike = vector_of("abc") @ vector_of(documents[result["index"]])
            assert result["relevance_score"] == pytest.approx(float(alike), abs=1e-6)
        assert results[0]["index"] == 0
        answer = server.request("POST", "/score", {"text_1": "abc", "text_2": "abc"})
        assert answer.json["data"][0]["score"] == pytest.approx(1)
