"""POST /v1/completions, through the official client and as bytes.

The engine repeats the prompt from its start, so that every answer is known.
"""

import pytest

END = 256


def test_a_completion_has_text_a_reason_and_usage(client):
    answer = client.completions.create(model="fake", prompt="abc", max_tokens=5)

    assert answer.choices[0].text == "abcab"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)
    assert answer.usage.total_tokens == 8
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


@pytest.mark.parametrize("name", [None, "", "fake", "alias"])
def test_every_served_name_is_taken_and_the_first_one_reported(server, name):  # HTTP-4
    assert server.complete(model=name, max_tokens=1).json["model"] == "fake"


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_numbered_by_prompt_and_then_by_choice(server, stream):  # STREAM-8, USAGE-3
    answer = server.complete(["abc", "xyz"], n=2, seed=0, max_tokens=3, stream=stream)
    texts = ["", "", "", ""]
    for body in answer.chunks if stream else [answer.json]:
        for choice in body["choices"]:
            texts[choice["index"]] += choice["text"]

    assert texts == ["abc", "bca", "xyz", "yzx"]
    if not stream:
        assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2, 3]
        assert answer.json["usage"] == {
            "prompt_tokens": 6,
            "completion_tokens": 12,
            "total_tokens": 18,
        }


@pytest.mark.parametrize("prompt", [[97, 98], [[97, 98]], ["ab"], "ab"])
def test_a_prompt_is_text_or_token_ids_or_a_list_of_either(server, prompt):
    assert server.complete(prompt, max_tokens=3).json["choices"][0]["text"] == "aba"


@pytest.mark.parametrize(
    ("fields", "text", "reason", "stop_reason"),
    [
        ({"stop": "d"}, "abc", "stop", "d"),
        ({"stop": ["zz", "cd"]}, "ab", "stop", "cd"),
        ({"stop": ["cd"], "include_stop_str_in_output": True}, "abcd", "stop", "cd"),
        ({"stop": ["e", "de"]}, "abcd", "stop", "e"),  # DETOK-5: the one first in the list
        ({"stop": ["de", "e"]}, "abc", "stop", "de"),
        ({"stop": ["a"], "min_tokens": 2}, "abcdef", "stop", "a"),  # DETOK-4
        ({"stop": ["ef"], "max_tokens": 6}, "abcd", "stop", "ef"),  # STOP-7: it wins over length
        ({"stop_token_ids": [100]}, "abc", "stop", 100),
        ({"stop_token_ids": [100], "include_stop_str_in_output": True}, "abcd", "stop", 100),
        ({"stop": None, "max_tokens": 2}, "ab", "length", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_and_stop_ids_end_a_choice(
    server, fields, text, reason, stop_reason, stream
):  # STOP-1, DETOK-6, DETOK-7
    answer = server.complete("abcdef", **{"max_tokens": 12, **fields}, stream=stream)
    choices = [body["choices"][0] for body in (answer.chunks if stream else [answer.json])]

    assert "".join(choice["text"] for choice in choices) == text
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == (reason, stop_reason)


def test_usage_counts_up_to_the_token_that_completed_a_stop_string(server):  # DETOK-6
    answer = server.complete("abcdef", stop="cd", max_tokens=100).json
    assert answer["usage"]["completion_tokens"] == 4


def test_an_end_of_sequence_token_ends_and_adds_no_text(server):  # STOP-1, DETOK-7
    ended = server.complete([97, 98, END], max_tokens=10).json["choices"][0]
    assert (ended["text"], ended["finish_reason"], ended["stop_reason"]) == ("ab", "stop", None)

    ignored = server.complete([97, 98, END], max_tokens=4, ignore_eos=True).json["choices"][0]
    assert (ignored["text"], ignored["finish_reason"]) == ("aba", "length")


def test_special_tokens_are_text_only_when_asked_for(server):  # DETOK-10
    fields = dict(max_tokens=3, ignore_eos=True, skip_special_tokens=False)
    choice = server.complete([97, END, 98], **fields).json["choices"][0]
    assert choice["text"].replace(" ", "") == "a<end>b"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(server, stream):  # REQ-8
    answer = server.complete("abc", echo=True, max_tokens=2, stream=stream)
    chunks = answer.chunks if stream else [answer.json]
    assert "".join(c["choices"][0]["text"] for c in chunks) == "abcab"


def test_a_character_is_never_cut_in_a_stream(server):  # DETOK-2
    text = "é€😀"
    answer = server.complete(text, max_tokens=len(text.encode()), stream=True)
    pieces = [chunk["choices"][0]["text"] for chunk in answer.chunks]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_four_lists_with_one_element_per_token(server, stream):  # STREAM-9, SAMPLE-9
    answer = server.complete("abc", max_tokens=3, logprobs=2, stream=stream)
    joined = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for body in answer.chunks if stream else [answer.json]:
        for name, values in (body["choices"][0]["logprobs"] or {}).items():
            joined[name] += values

    assert joined["tokens"] == ["a", "b", "c"]
    assert joined["token_logprobs"] == pytest.approx([-0.6931, -0.6931, -0.6931], abs=1e-3)
    assert [sorted(top) for top in joined["top_logprobs"]] == [["a", "b"], ["b", "c"], ["c", "d"]]
    assert joined["text_offset"] == [0, 1, 2]


def test_logprobs_of_an_echoed_prompt_begin_with_null(server):
    lists = server.complete("abc", max_tokens=1, logprobs=1, echo=True).json["choices"][0]
    assert lists["text"] == "abca"
    assert lists["logprobs"]["tokens"] == ["a", "b", "c", "a"]
    assert lists["logprobs"]["token_logprobs"][0] is None
    assert lists["logprobs"]["top_logprobs"][0] is None
    assert None not in lists["logprobs"]["token_logprobs"][1:]
    assert lists["logprobs"]["text_offset"] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_echoes_the_prompts_scores(server, stream):
    answer = server.complete(
        ["abc", "de"], n=3, seed=0, max_tokens=2, logprobs=1, echo=True, stream=stream
    )
    tokens = [[] for _ in range(6)]
    for body in answer.chunks if stream else [answer.json]:
        for choice in body["choices"]:
            tokens[choice["index"]] += (choice["logprobs"] or {"tokens": []})["tokens"]
    texts = ["".join(each) for each in tokens]
    assert texts == ["abcab", "abcbc", "abcca", "dede", "deed", "dede"]


def test_prompt_logprobs_have_one_entry_per_prompt_token(server):
    choice = server.complete("abc", max_tokens=1, prompt_logprobs=2).json["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert [list(entry) for entry in others] == [["98", "99"], ["99", "100"]]
    assert others[0]["98"]["rank"] == 1
    assert others[0]["98"]["decoded_token"] == "b"
    assert others[0]["98"]["logprob"] == pytest.approx(-0.6931, abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_come_on_request(server, stream):
    answer = server.complete("abc", max_tokens=4, return_token_ids=True, stream=stream)
    choices = [body["choices"][0] for body in (answer.chunks if stream else [answer.json])]
    assert [i for choice in choices for i in choice["token_ids"]] == [97, 98, 99, 97]
    assert choices[0]["prompt_token_ids"] == [97, 98, 99]


def test_truncation_keeps_the_end_of_a_prompt(server):  # REQ-8
    answer = server.complete("abcdef", truncate_prompt_tokens=2, max_tokens=2).json
    assert (answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]) == ("ef", 2)


def test_a_salted_prompt_is_served(server):
    assert server.complete("abc", cache_salt="mine", max_tokens=1).status == 200
