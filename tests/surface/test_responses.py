"""/v1/responses through the official client: create, stream, go on, retrieve, cancel.

The template renders "user:hi;assistant:", and the engine repeats that.
"""

import openai
import pytest
from openai.types.responses import Response


def test_a_response_has_one_message_of_text_and_usage(client):
    response = client.responses.create(model="fake", input="hi", max_output_tokens=7)

    assert response.output_text == "user:hi"
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (18, 7)
    assert response.id.startswith("resp_")
    assert response.output[0].role == "assistant"


def test_a_response_is_what_its_declaration_says(server):
    answer = server.request("POST", "/v1/responses", {"input": "hi", "max_output_tokens": 3})
    Response.model_validate(answer.json)


def test_instructions_and_messages_become_a_conversation(client):
    response = client.responses.create(
        model="fake",
        instructions="be brief",
        input=[
            {"role": "developer", "content": "a"},
            {"role": "user", "content": [{"type": "input_text", "text": "b"}]},
        ],
        max_output_tokens=41,
    )
    assert response.output_text == "system:be brief;system:a;user:b;assistant"


def test_streamed_events_come_in_order_and_join_to_the_text(server, client):
    server.engine.pause()
    stream = client.responses.create(model="fake", input="hi", max_output_tokens=3, stream=True)
    for _ in range(3):
        server.engine.advance(1)
    server.engine.release()
    events = list(stream)

    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "use"
    assert events[-1].response.output_text == "use"
    assert client.responses.retrieve(events[0].response.id).output_text == "use"


def test_a_response_can_be_asked_for_again_and_forgotten(client):
    made = client.responses.create(model="fake", input="hi", max_output_tokens=3)
    assert client.responses.retrieve(made.id) == made
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_one_that_shall_not_be_stored_is_not(client):
    made = client.responses.create(model="fake", input="hi", max_output_tokens=3, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_response_goes_on_from_an_earlier_one(client):
    first = client.responses.create(
        model="fake", instructions="not kept", input="hi", max_output_tokens=4
    )
    second = client.responses.create(
        model="fake", input="go on", previous_response_id=first.id, max_output_tokens=100
    )
    assert second.output_text.startswith("system:not kept") is False
    assert second.output_text.startswith("user:hi;assistant:syst;user:go on;assistant:")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.responses.create(model="fake", input="x", previous_response_id="resp_none")
    assert unknown.value.param == "previous_response_id"


def test_a_background_response_runs_without_a_reader(server, client):
    server.engine.pause()
    made = client.responses.create(model="fake", input="hi", max_output_tokens=3, background=True)
    assert made.status == "in_progress"
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="fake", input="x", previous_response_id=made.id)
    server.engine.release()
    server.engine.wait_for_live(0)
    while (now := client.responses.retrieve(made.id)).status == "in_progress":
        pass
    assert (now.status, now.output_text) == ("incomplete", "use")


def test_a_background_response_can_be_cancelled(server, client):
    server.engine.pause()
    made = client.responses.create(model="fake", input="hi", background=True)
    server.engine.wait_for_live(1)
    assert client.responses.cancel(made.id).status == "cancelled"
    server.engine.wait_for_live(0)
    assert client.responses.cancel(made.id).status == "cancelled"


def test_only_a_background_response_can_be_cancelled(client):
    made = client.responses.create(model="fake", input="hi", max_output_tokens=3)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(made.id)


def test_a_reader_that_leaves_cancels_its_stream(server, client):
    server.engine.pause()
    stream = client.responses.create(model="fake", input="hi", stream=True)
    made = next(iter(stream)).response
    server.engine.wait_for_live(1)
    stream.close()
    server.engine.wait_for_live(0)
    while (now := client.responses.retrieve(made.id)).status == "in_progress":
        pass
    assert now.status == "cancelled"


def test_a_failure_is_told_in_the_stream(server, client):
    server.engine.pause()
    server.engine.fail_running("NaN logits")
    server.engine.release()
    *_, last = client.responses.create(model="fake", input="hi", stream=True)
    assert last.type == "response.failed"
    assert "NaN logits" in last.response.error.message


def test_others_cannot_see_it(locked):
    with locked.client(api_key="first-key") as one, locked.client(api_key="second-key") as two:
        made = one.responses.create(model="fake", input="hi", max_output_tokens=3)
        with pytest.raises(openai.NotFoundError):
            two.responses.retrieve(made.id)
        assert one.responses.retrieve(made.id).id == made.id


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": None}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [3]}, 400, "input"),
        ({"input": [{"role": 3, "content": "x"}]}, 400, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input"),
        ({"input": [{"type": "function_call"}]}, 501, "input"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"tools": [{"type": "web_search"}]}, 501, "tools"),
        ({"text": {"format": {"type": "json_object"}}}, 501, "text"),
        ({"text": 3}, 400, "text"),
        ({"background": True, "stream": True}, 501, "stream"),
        ({"background": True, "store": False}, 400, "store"),
        ({"truncation": "x"}, 400, "truncation"),
    ],
)
def test_what_is_wrong_or_not_built_is_told(server, fields, code, param):
    error = server.request("POST", "/v1/responses", {"input": "hi", **fields}).error
    assert (error["code"], error["param"]) == (code, param)


def test_fields_without_effect_are_told(server):
    answer = server.request(
        "POST",
        "/v1/responses",
        {"input": "hi", "max_output_tokens": 1, "reasoning": {}, "zebra": 1, "metadata": {}},
    )
    assert answer.headers["x-pagedcore-ignored-params"] == "reasoning,zebra"
