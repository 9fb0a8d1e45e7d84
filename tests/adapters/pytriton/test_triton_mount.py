"""What clients of a real tritonserver see: text and tokens, streams, errors, cancellation."""

import http.client
import json


def post(mounted, body, path="generate", headers=None):
    connection = http.client.HTTPConnection(mounted.http, timeout=60)
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(
        "POST",
        f"/v2/models/fake/{path}",
        text,
        {"Content-Type": "application/json"} | (headers or {}),
    )
    answer = connection.getresponse()
    return connection, answer


def generate(mounted, headers=None, **body):
    connection, answer = post(mounted, body, headers=headers)
    try:
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def stream(mounted, **body):
    connection, answer = post(mounted, {**body, "stream": True}, "generate_stream")
    try:
        text = answer.read().decode()
    finally:
        connection.close()
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


def test_text_goes_in_and_text_comes_out(mounted):
    status, answer = generate(
        mounted, text_input="abc", sampling_parameters=json.dumps({"max_tokens": 7})
    )
    assert status == 200
    assert answer["text_output"] == "abcabca"
    assert answer["finish_reason"] == "length"
    assert answer["num_output_tokens"] == 7
