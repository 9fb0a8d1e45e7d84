"""The log: one object a line where that was asked for, and nothing that people wrote."""

import json


def test_a_log_of_objects_has_nothing_else_and_no_prompt(start):  # R27, CFG-1
    with start(log_format="json", enable_log_requests=True) as server:
        assert server.complete("my secret", max_tokens=1).status == 200
        assert server.complete("my secret", max_tokens=0).status == 400
        assert server.stop() == 0
        text = server.log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    messages = [line["message"] for line in lines]
    assert any("model is loading" in message for message in messages)
    assert sum("/v1/completions" in message for message in messages) == 2
    assert "secret" not in text


def test_requests_are_not_logged_unless_that_was_asked_for(server):
    assert server.complete(max_tokens=1).status == 200
    assert "/v1/completions" not in server.log.read_text()
