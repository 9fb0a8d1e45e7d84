"""Bodies of reliability.md 1a that must not hurt: each is refused, or served, and forgotten."""

import gzip
import json

import pytest

DEEP = 100_000
HUGE = [10**6, 2**31, 2**63, 2**64, 10**18]


def post(server, body, path="/v1/completions", **headers):
    return server.request("POST", path, body, {"content-type": "application/json", **headers})


def completion(**fields):
    return json.dumps({"prompt": "abc", "max_tokens": 1, **fields}).encode()


def chat(**fields):
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()


INTEGERS = (
    "n",
    "max_tokens",
    "min_tokens",
    "top_k",
    "logprobs",
    "prompt_logprobs",
    "seed",
    "priority",
    "truncate_prompt_tokens",
    "best_of",
)
FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@pytest.mark.hostile("IN-1", "IN-2", "IN-11", "IN-31")
@pytest.mark.parametrize("name", INTEGERS)
def test_no_integer_field_takes_what_is_no_small_integer(server, name):
    for text in ("1e400", '"1"', "true", "1.5", "[1]", "{}", "-9223372036854775809"):
        body = b'{"prompt": "abc", "%s": %s}' % (name.encode(), text.encode())
        assert post(server, body).status == 400, text
    for number in HUGE:
        answer = post(server, completion(**{name: number}))
        assert answer.status in (200, 400), number  # a seed may be large, and so may top_k


@pytest.mark.hostile("IN-6")
@pytest.mark.parametrize("name", FLOATS)
def test_no_float_field_takes_what_is_not_finite(server, name):
    for text in ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", '"1"', "true", "[]"):
        body = b'{"prompt": "abc", "%s": %s}' % (name.encode(), text.encode())
        assert post(server, body).status == 400, text


@pytest.mark.hostile("IN-8")
@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "prompt"])
def test_no_list_of_ids_takes_one_outside_the_vocabulary(server, name):
    for bad in (-1, 512, 2**31, 2**63, 10**30, 1.5, True, "a", None, [1]):
        assert post(server, completion(**{name: [97, bad]})).status == 400, bad


@pytest.mark.hostile("IN-7")
@pytest.mark.parametrize("key", ["-1", "512", "99999999999999999999", "a", "", "1.5", "1e3"])
def test_no_bias_is_for_a_token_that_is_none(server, key):
    assert post(server, completion(logit_bias={key: 1})).status == 400


@pytest.mark.hostile("IN-7")
@pytest.mark.parametrize("value", ["NaN", "Infinity", '"1"', "true", "null", "[]"])
def test_no_bias_is_no_number(server, value):
    body = b'{"prompt": "abc", "logit_bias": {"1": %s}}' % value.encode()
    assert post(server, body).status == 400


@pytest.mark.hostile("IN-4", "IN-5", "IN-24")
@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["x"] * 500_000},
        {"bad_words": ["x"] * 50_000},
        {"logit_bias": {str(i): 0 for i in range(100_000)}},
        {"prompt": ["x"] * 100_000},
        {"prompt": [[97]] * 100_000},
        {"prompt": [97] * 1_000_000},
        {"stop_token_ids": [97] * 4_000_000},
        {"prompt": "x" * 5_000_000},
        {"n": 129},
        {"n": 128, "prompt": ["a"] * 1025},
    ],
)
def test_lists_and_texts_without_bound_are_refused(server, fields):
    answer = post(server, completion(**fields))
    assert answer.error["code"] == 400
    assert len(answer.body) < 1000


@pytest.mark.hostile("IN-16", "IN-42")
@pytest.mark.parametrize(
    "body",
    [
        b"[" * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP,
        b'{"prompt": "abc", "metadata": ' + b'{"a":' * 500 + b"1" + b"}" * 501,
        b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}",
        b"",
        b"null",
        b"3",
        b'"abc"',
        b"[]",
        b"{",
        b'{"prompt": "abc"} {"prompt": "abc"}',
        b'{"prompt": "abc"}x',
        b'{"prompt": "abc", "prompt": "abc"}',
        b'{"prompt": "abc", "temperature": NaN}',
        b'\xef\xbb\xbf{"prompt": "abc"}',
        '{"prompt": "abc"}'.encode("utf-16"),
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b"\x00" * 100,
        b"prompt=abc",
        b"1" * 100_000,
        b'{"prompt": "abc", "seed": ' + b"9" * 100_000 + b"}",
        gzip.compress(mtime=0, data=b'{"prompt": "abc"}'),
    ],
)
def test_bodies_that_are_no_proper_json_object_are_400(server, body):
    assert post(server, body).error["code"] == 400


@pytest.mark.hostile("IN-42")
def test_a_compressed_body_is_never_unpacked(server):
    bomb = gzip.compress(b" " * (50 << 20))
    answer = post(server, bomb, **{"content-encoding": "gzip"})
    assert answer.error["code"] == 415


@pytest.mark.hostile("IN-31")
@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\x00", "\u2028", "\ufeff", "é" * 1000])
def test_strange_characters_in_a_prompt_are_text_or_400(server, text):
    body = json.dumps({"prompt": text, "max_tokens": 1}).encode()
    assert post(server, body).status in (200, 400)


@pytest.mark.hostile("IN-29", "IN-30")
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "text"},
        {"type": "text", "text": 3},
        {"image_url": "http://127.0.0.1:1"},
        3,
        None,
    ],
)
def test_parts_that_are_no_text_are_400(server, part):
    messages = [{"role": "user", "content": [part]}]
    assert post(server, chat(messages=messages), "/v1/chat/completions").error["code"] == 400


@pytest.mark.hostile("IN-32")
@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hi",
        [],
        {},
        [123],
        [None],
        [{}],
        [{"role": 123, "content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": None, "content": "x"}],
        [{"content": "x"}],
        [[{"role": "user", "content": "x"}]],
    ],
)
def test_messages_that_are_none_are_400(server, messages):
    answer = post(server, chat(messages=messages), "/v1/chat/completions")
    assert answer.error["code"] == 400


@pytest.mark.hostile("IN-21")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"chat_template": "{{ 1 }}"},
        {"tokenize": False},
        {"messages": []},
        {"tools": []},
        {"documents": []},
        {"add_generation_prompt": False},
    ],
)
def test_a_template_is_never_the_clients(server, kwargs):
    answer = post(server, chat(chat_template_kwargs=kwargs), "/v1/chat/completions")
    assert answer.error["code"] == 400


@pytest.mark.hostile("IN-21", "IN-22")
@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% for a in [1] %}{{ a.__class__ }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{",
    ],
)
def test_a_trusted_template_still_cannot_leave_its_sandbox(generous, template):
    answer = post(generous, chat(chat_template=template), "/v1/chat/completions")
    assert answer.error["code"] == 400
    assert "root:" not in answer.error["message"]


@pytest.mark.hostile("IN-25")
@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_the_name_of_a_special_token_is_text_where_people_write_it(server, role):
    messages = [{"role": role, "content": "a<end>b<<end>>"}, {"role": "system", "content": "<end>"}]
    tokens = server.request("POST", "/tokenize", {"messages": messages}).json["tokens"]
    assert tokens.count(256) == 1, "the one in the instructions"
    text = server.request("POST", "/detokenize", {"tokens": tokens}).json["prompt"]
    assert text == f"{role}:a<end>b<<end>>;system:<end>;assistant:"
    answer = server.chat("<end>").json
    assert answer["usage"]["prompt_tokens"] == len("user:<end>;assistant:")


@pytest.mark.hostile("IN-26")
@pytest.mark.parametrize("request_id", ["x" * (1 << 20), "../../etc", "\n", "", "é", 3, ["a"]])
def test_a_clients_request_id_is_echoed_only_within_limits(server, request_id):
    answer = post(server, completion(request_id=request_id))
    assert answer.status in (200, 400)
    assert len(answer.headers["x-request-id"]) <= 128


@pytest.mark.hostile("IN-27", "IN-50")
def test_no_error_repeats_a_long_input_or_a_path(server):
    secret = "s3cret" * 1000
    for body in (
        completion(model=secret),
        completion(stop=[secret, 3]),
        completion(**{secret: 1, "max_tokens": 0}),
        chat(chat_template=secret),
        completion(response_format={"type": secret}),
    ):
        path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
        message = post(server, body, path).error["message"]
        assert len(message) <= 2048
        assert secret not in message
        assert "/work" not in message
        assert "/tmp" not in message
        assert "0x" not in message
        assert "Traceback" not in message


@pytest.mark.hostile("IN-28")
def test_embeddings_of_a_prompt_are_not_taken(server):
    answer = post(server, json.dumps({"prompt_embeds": "AAAA"}).encode())
    assert answer.error["code"] == 400


@pytest.mark.hostile("IN-31")
@pytest.mark.parametrize("name", ["echo", "stream", "ignore_eos", "return_token_ids"])
def test_no_boolean_field_takes_anything_else(server, name):
    for value in (0, 1, "true", [], {}):
        assert post(server, completion(**{name: value})).status == 400, value


@pytest.mark.hostile("IN-24")
def test_a_conversation_without_bound_is_refused(server):
    messages = [{"role": "user", "content": "x" * 100_000}] * 10
    answer = post(server, chat(messages=messages), "/v1/chat/completions")
    assert answer.error["param"] == "messages"
    text = {"prompt": "x" * 1_000_000}
    assert server.request("POST", "/tokenize", text).error["param"] == "prompt"


@pytest.mark.hostile("IN-9")
def test_prompt_scores_without_an_output_are_refused(server):
    assert post(server, completion(echo=True, max_tokens=0, logprobs=1)).status == 400


@pytest.mark.hostile("IN-13")
def test_malformed_tools_are_refused(server):
    for tools in ({}, 3, "x", [3], [[]], [{"type": "function", "function": {"parameters": 3}}]):
        answer = post(server, chat(tools=tools), "/v1/chat/completions")
        assert answer.status in (400, 501), tools
