"""What is taken, refused, ignored and adjusted among the fields of a request (semantics 5.2)."""

import json

import pytest

MODEL_LENGTH = 4096
IGNORED = "x-pagedcore-ignored-params"
ADJUSTED = "x-pagedcore-adjusted-params"


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_are_named_in_a_header_and_served(server, stream):  # REQ-3
    answer = server.complete(max_tokens=1, stream=stream, zebra=1, apple=2, user="me")
    assert answer.status == 200
    assert answer.headers[IGNORED] == "apple,user,zebra"


def test_without_unknown_fields_there_is_no_header(server):  # REQ-3
    assert IGNORED not in server.complete(max_tokens=1).headers


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        ({"stream": True, "stream_options": {"include_usage": True, "x": 1}}, "stream_options.x"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        ({"best_of": 1}, "best_of"),
        ({"guided_decoding_backend": "x"}, "guided_decoding_backend"),
        ({"a,b\n": 1}, "a%2Cb%0A"),
        ({"é": 1}, "%C3%A9"),
        ({"\ud800": 1}, "%5Cud800"),
    ],
)
def test_paths_are_told_in_printable_characters(server, fields, paths):  # REQ-4, LEG-3
    answer = server.complete(max_tokens=1, **fields)
    assert (answer.status, answer.headers[IGNORED]) == (200, paths)


def test_unknown_fields_of_tools_have_a_path(server):  # REQ-4
    tool = {"type": "function", "function": {"name": "f", "x": 1}, "y": 2}
    answer = server.chat("hi", tools=[tool], tool_choice="none")
    assert answer.headers[IGNORED] == "tools[0].function.x,tools[0].y"


def test_a_long_list_of_unknown_fields_ends_at_a_whole_name(server):  # REQ-4
    names = [f"{'x' * 90}{i:03}" for i in range(100)]
    header = server.complete(max_tokens=1, **dict.fromkeys(names, 1)).headers[IGNORED]
    *listed, end = header.split(",")
    assert end == "..."
    assert listed == names[: len(listed)]
    assert 4000 < len(header) <= 4096


def test_strict_mode_refuses_unknown_fields_and_not_those_without_effect(strict):  # REQ-2, REQ-3
    error = strict.complete(max_tokens=1, zebra=1, apple=2).error
    assert (error["code"], error["param"]) == (400, "apple")
    nested = strict.chat("hi", stream=True, stream_options={"x": 1}).error
    assert nested["param"] == "stream_options.x"

    known = strict.complete(max_tokens=1, user="me", metadata={"a": 1}, store=True)
    assert (known.status, known.headers[IGNORED]) == (200, "metadata,store,user")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[97], [100000]]}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": MODEL_LENGTH + 1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"min_tokens": 2**31}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [512]}, "allowed_token_ids"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"priority": 1}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"stream": True, "prompt_logprobs": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"response_format": {"type": "x"}}, "response_format"),
        ({"repetition_detection": {"max_pattern_size": 0, "min_count": 2}}, "repetition_detection"),
        ({"repetition_detection": {"max_pattern_size": 4}}, "repetition_detection"),
    ],
)
def test_a_completions_bad_value_is_400_and_named(server, fields, param):  # SAMPLE-1, REQ-5..8
    error = server.request("POST", "/v1/completions", {"prompt": "abc", **fields}).error
    assert (error["code"], error["type"], error["param"]) == (400, "BadRequestError", param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [123]}, "messages"),
        ({"messages": [{}]}, "messages"),
        ({"messages": [{"role": 123, "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, None),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": MODEL_LENGTH + 1}, "max_completion_tokens"),
    ],
)
def test_a_conversations_bad_value_is_400_and_named(server, fields, param):  # REQ-5..9
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    error = server.request("POST", "/v1/chat/completions", body).error
    assert (error["code"], error["type"]) == (400, "BadRequestError")
    assert param is None or error["param"].partition("[")[0] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None},
        {"temperature": 0, "max_tokens": MODEL_LENGTH - 3, "stop": "abca"},
        {"top_k": -1},
        {"top_k": 100000},
        {"logit_bias": {"97": 1000}},
        {"stop": []},
        {"seed": -(2**63)},
        {"priority": 0},
        {"use_beam_search": False},
        {"response_format": {"type": "text"}},
        {"bad_words": ["zz"]},
        {"vllm_xargs": {"a": 1}},
        {"repetition_detection": {"max_pattern_size": 2, "min_count": 9}},
    ],
)
def test_a_good_value_at_its_limit_is_taken(server, fields):
    assert server.complete(**fields).status == 200


def test_a_prompt_as_long_as_the_model_is_refused_with_both_numbers(server):  # REQ-7
    error = server.complete("x" * MODEL_LENGTH).error
    assert (error["code"], error["param"]) == (400, "prompt")
    assert error["message"].count(str(MODEL_LENGTH)) >= 2
    assert len(error["message"]) < 400


def test_max_tokens_is_cut_to_what_is_left_and_told(server):  # REQ-7
    answer = server.complete("x" * (MODEL_LENGTH - 5), max_tokens=8)
    assert answer.headers[ADJUSTED] == "max_tokens=5"
    assert answer.json["usage"]["completion_tokens"] == 5
    assert answer.json["choices"][0]["finish_reason"] == "length"


def test_a_default_that_is_cut_is_not_told(server):  # REQ-7
    answer = server.complete("x" * (MODEL_LENGTH - 5))
    assert ADJUSTED not in answer.headers
    assert answer.json["usage"]["completion_tokens"] == 5


def test_a_stream_tells_in_its_headers_what_was_adjusted(server):  # REQ-7
    answer = server.complete("x" * (MODEL_LENGTH - 5), max_tokens=8, stream=True)
    assert answer.headers[ADJUSTED] == "max_tokens=5"


def test_priority_is_taken_under_its_policy(generous):  # REQ-8
    assert generous.complete(priority=-3, max_tokens=1).status == 200


def test_a_trusted_server_takes_a_requests_own_template(generous):  # REQ-9
    answer = generous.chat("hi", chat_template="<{{ messages[0].content }}>", max_tokens=4)
    assert answer.json["choices"][0]["message"]["content"] == "<hi>"
    broken = generous.chat("hi", chat_template="{{ undefined_function() }}").error
    assert broken["code"] == 400


@pytest.mark.parametrize("header", ["mine-1.2_3", "x" * 128])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_id_is_echoed_and_makes_the_answers_id(server, header, stream):  # STREAM-1
    answer = server.complete(max_tokens=2, stream=stream, headers={"x-request-id": header})
    bodies = answer.chunks if stream else [answer.json]
    assert {body["id"] for body in bodies} == {f"cmpl-{header}"}
    assert answer.headers["x-request-id"] == header


@pytest.mark.parametrize("header", ["x" * 129, "a b", "a/b", "é", ""])
def test_an_unfit_request_id_is_replaced(server, header):  # STREAM-1, IN-26
    answer = server.complete(max_tokens=1, headers={"x-request-id": header.encode()})
    assert answer.headers["x-request-id"] not in (header, "")
    assert answer.json["id"] == f"cmpl-{answer.headers['x-request-id']}"


def test_the_field_request_id_counts_where_there_is_no_header(server):  # STREAM-1
    assert server.complete(max_tokens=1, request_id="mine").json["id"] == "cmpl-mine"
    both = server.complete(max_tokens=1, request_id="mine", headers={"x-request-id": "other"})
    assert both.json["id"] == "cmpl-other"


def test_a_repeated_request_id_is_harmless(server, client):  # STREAM-1, IN-26
    server.engine.pause()
    streams = [
        client.completions.create(
            model="fake", prompt=text, max_tokens=3, stream=True, extra_body={"request_id": "same"}
        )
        for text in ("abc", "xyz")
    ]
    server.engine.release()
    texts = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
    assert texts == ["abc", "xyz"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_the_work(server, stream):
    server.engine.pause()
    answer = server.complete(max_tokens=100, stream=stream, headers={"x-request-timeout": "0.05"})
    if stream:
        assert answer.status == 200
        error, end = json.loads(answer.events[-2])["error"], answer.events[-1]
        assert (error["code"], end) == (408, "[DONE]")
    else:
        assert answer.error["type"] == "RequestTimeoutError"
        assert answer.headers["x-should-retry"] == "false"
    server.engine.wait_for_live(0)


@pytest.mark.parametrize("value", ["0", "-1", "x", "", "nan", "inf", "1e3", "1" * 30])
def test_a_deadline_that_is_no_number_of_seconds_is_refused(server, value):
    error = server.complete(headers={"x-request-timeout": value}).error
    assert (error["code"], error["param"]) == (400, "x-request-timeout")


def test_a_deadline_that_is_kept_changes_nothing(server):
    assert server.complete(headers={"x-request-timeout": "30"}).status == 200
