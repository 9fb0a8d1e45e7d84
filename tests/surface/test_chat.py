"""POST /v1/chat/completions, through the official client and as bytes.

The template renders "user:hi;assistant:", and the engine repeats that.
"""

import pytest

HI = [{"role": "user", "content": "hi"}]


def test_an_answer_has_a_message_a_reason_and_usage(client):
    answer = client.chat.completions.create(model="fake", messages=HI, max_tokens=7)

    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "user:hi"
    assert answer.choices[0].message.refusal is None
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (18, 7)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"


def test_a_streams_first_chunk_has_the_role_and_its_last_the_reason(server, client):  # STREAM-2
    server.engine.pause()
    stream = client.chat.completions.create(
        model="fake", messages=HI, max_completion_tokens=2, stream=True
    )
    server.engine.advance(1)
    first, second = next(stream), next(stream)
    server.engine.release()
    (last,) = stream

    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert (second.choices[0].delta.role, second.choices[0].delta.content) == (None, "u")
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == ("s", "length")
    assert {chunk.object for chunk in (first, second, last)} == {"chat.completion.chunk"}


def test_parts_of_text_are_joined_as_text(server):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    answer = server.chat(parts, max_tokens=18)
    assert "h" in answer.json["choices"][0]["message"]["content"]


def test_without_a_limit_an_answer_may_fill_the_models_length(server):  # REQ-6
    answer = server.chat("hi", max_tokens=None, stream=False, stop="assistant")
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    assert answer.json["choices"][0]["message"]["content"] == "user:hi;"


def test_max_completion_tokens_wins(server):  # REQ-6
    answer = server.chat("hi", max_tokens=9, max_completion_tokens=3)
    assert answer.json["usage"]["completion_tokens"] == 3


def test_the_last_message_can_be_continued(server):
    messages = [*HI, {"role": "assistant", "content": "ok"}]
    answer = server.request(
        "POST",
        "/v1/chat/completions",
        {
            "messages": messages,
            "add_generation_prompt": False,
            "continue_final_message": True,
            "max_tokens": 100,
            "stop": ["ok"],
            "echo": True,
        },
    )
    assert (
        answer.json["choices"][0]["message"]["content"] == "user:hi;assistant:okuser:hi;assistant:"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_one_conversation_differ_by_their_seed(server, stream):  # SAMPLE-10
    answer = server.chat("hi", n=3, seed=0, max_tokens=4, stream=stream)
    texts = ["", "", ""]
    for body in answer.chunks if stream else [answer.json]:
        for choice in body["choices"]:
            message = choice["delta"] if stream else choice["message"]
            texts[choice["index"]] += message.get("content", "")
    assert texts == ["user", "ser:", "er:h"]


def test_logprobs_have_bytes_and_the_most_likely_tokens(client):  # STREAM-9
    answer = client.chat.completions.create(
        model="fake", messages=HI, max_tokens=2, logprobs=True, top_logprobs=3
    )
    first, second = answer.choices[0].logprobs.content
    assert (first.token, first.bytes, second.token) == ("u", [117], "s")
    assert first.logprob == pytest.approx(-0.6931, abs=1e-3)
    assert [top.token for top in first.top_logprobs] == ["u", "v", "w"]


def test_logprobs_without_a_number_tell_of_the_sampled_token_only(server):
    answer = server.chat("hi", logprobs=True, max_tokens=1).json
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["top_logprobs"]) == ("u", [])


def test_streamed_logprobs_have_each_token_once(server):  # STREAM-3
    answer = server.chat("é€", logprobs=True, max_tokens=14, stream=True, top_logprobs=1)
    entries = [
        entry["bytes"]
        for chunk in answer.chunks
        for entry in (chunk["choices"][0].get("logprobs") or {"content": []})["content"]
    ]
    assert [byte for entry in entries for byte in entry] == list("user:é€;ass".encode())[:14]


def test_prompt_logprobs_and_token_ids_stand_beside_the_choices(server):
    answer = server.chat("hi", prompt_logprobs=1, return_token_ids=True, max_tokens=2).json
    assert bytes(answer["prompt_token_ids"]) == b"user:hi;assistant:"
    assert len(answer["prompt_logprobs"]) == 18
    assert answer["prompt_logprobs"][0] is None
    assert answer["choices"][0]["token_ids"] == list(b"us")


def test_template_variables_reach_the_template(server):
    answer = server.chat("hi", chat_template_kwargs={"anything": 1})
    assert answer.status == 200


def test_a_models_tools_are_only_read_with_tool_choice_none(server):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert server.chat("hi", tools=[tool], tool_choice="none").status == 200
    assert server.chat("hi", tools=[tool]).error["param"] == "tools"
