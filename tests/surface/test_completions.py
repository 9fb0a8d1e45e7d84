"""POST /v1/completions, through the official client and as bytes."""

import pytest


def test_a_completion_has_text_a_reason_and_usage(client):
    answer = client.completions.create(model="fake", prompt="abc", max_tokens=5)

    assert answer.choices[0].text == "abcab"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == "fake"


def test_a_stream_gives_each_token_at_once_and_joins_to_the_whole_text(server, client):
    server.engine.pause()
    stream = client.completions.create(model="fake", prompt="abc", max_tokens=5, stream=True)
    chunks = []
    for _ in range(5):
        server.engine.advance(1)
        chunks.append(next(stream))

    assert list(stream) == []
    assert [chunk.choices[0].text for chunk in chunks] == ["a", "b", "c", "a", "b"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["length"]
    assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "fake")
    }


@pytest.mark.parametrize("stream", [False, True])
def test_sixteen_tokens_are_the_default(server, stream):  # REQ-6
    answer = server.complete("ab", stream=stream)
    chunks = answer.chunks if stream else [answer.json]
    assert "".join(c["choices"][0]["text"] for c in chunks) == "ab" * 8
