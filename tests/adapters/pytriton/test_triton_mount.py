"""What clients of a real tritonserver see: text and tokens, streams, errors, cancellation."""

import contextlib
import http.client
import json
import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from pagedcore_pytriton import completions


def post(http_address, body, path="generate"):
    """The open connection, and the answer's head."""
    connection = http.client.HTTPConnection(http_address, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(
        "POST",
        f"/v2/models/fake/{path}",
        data,
        {"Content-Type": "application/json"},
    )
    return connection, connection.getresponse()


def generate(mounted, **body):
    """The whole answer, without the input."""
    body = {"exclude_input_in_output": True, **body}
    connection, answer = post(mounted.http, body)
    with closing(connection):
        return answer.status, json.loads(answer.read())


def stream(mounted, **body):
    connection, answer = post(mounted.http, {**body, "stream": True}, "generate_stream")
    with closing(connection):
        lines = answer.read().decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def sampling(**params):
    return json.dumps(params)


def byte_ids(text):
    """Token ids of a text of printable ASCII: `abc` to `[66, 67, 68]`."""
    return [ord(character) - 33 for character in text]


class GrpcStream:
    """One gRPC stream; `results` yields responses, or raises the error that came."""

    def __init__(self, address, headers=None):
        self._client = triton_grpc.InferenceServerClient(address)
        self._arrived = queue.Queue()
        self._client.start_stream(
            lambda result, error: self._arrived.put((result, error)), headers=headers
        )

    def ask(self, **inputs):
        tensors = []
        for name, value in inputs.items():
            kind = {"input_ids": "INT32", "stream": "BOOL"}.get(name, "BYTES")
            array = np.atleast_1d(np.array(value, object if kind == "BYTES" else None))
            if kind == "INT32":
                array = array.astype(np.int32)
            tensors.append(triton_grpc.InferInput(name, array.shape, kind))
            tensors[-1].set_data_from_numpy(array)
        self._client.async_stream_infer("fake", tensors, enable_empty_final_response=True)

    def results(self):
        while True:
            result, error = self._arrived.get(timeout=60)
            if error is not None:
                raise error
            if result.as_numpy("text_output") is not None:
                yield result
            if result.get_response().parameters["triton_final_response"].bool_param:
                return

    def close(self, cancel=False):
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def test_text_goes_in_and_text_comes_out(mounted):
    status, answer = generate(mounted, text_input="abc", sampling_parameters=sampling(max_tokens=7))
    assert status == 200
    assert answer["text_output"] == "abcabca"
    assert answer["finish_reason"] == "length"
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (3, 7)
    assert answer["output_ids"] == byte_ids("abcabca")


def test_the_answer_to_a_text_repeats_it_as_vllms_backend_does(mounted):
    connection, answer = post(mounted.http, {"text_input": "abc", "max_tokens": 2})
    with closing(connection):
        assert json.loads(answer.read())["text_output"] == "abcab"
    assert generate(mounted, input_ids=[65], max_tokens=2, exclude_input_in_output=False)[0] == 200
    (error,) = stream(mounted, text_input="abc", exclude_input_in_output=False)
    assert "a stream cannot repeat the input" in error["error"]


def test_numbers_may_be_text_as_clients_of_vllms_backend_send_them(mounted):
    params = sampling(temperature="0.1", top_p="0.95", max_tokens="3", ignore_eos="True")
    status, answer = generate(mounted, text_input="abc", sampling_parameters=params)
    assert (status, answer["text_output"]) == (200, "abc")


def test_outputs_that_are_not_wanted_do_not_come(mounted):
    status, answer = generate(mounted, text_input="abc", max_tokens=2, return_finish_reason=False)
    assert status == 200
    assert "finish_reason" not in answer
    assert answer["num_output_tokens"] == 2


def test_token_ids_go_in(mounted):
    status, answer = generate(mounted, input_ids=[65, 66], max_tokens=3)
    assert (status, answer["text_output"]) == (200, "bcb")


def test_a_conversation_goes_through_the_chat_template(mounted):
    messages = json.dumps([{"role": "user", "content": "hi"}])
    status, answer = generate(mounted, messages=messages, max_tokens=8)
    assert (status, answer["text_output"]) == (200, "user:hi;")


def test_several_choices_come_in_one_answer(mounted):
    status, answer = generate(mounted, text_input="abc", max_tokens=2, n=3, seed=0)
    assert status == 200
    assert answer["text_output"] == ["ab", "bc", "ca"]
    assert answer["index"] == [0, 1, 2]
    assert answer["output_ids"] == byte_ids("abbcca")


def test_a_stream_has_the_text_of_the_whole_answer(mounted):
    parts = stream(mounted, text_input="abcdefg", max_tokens=3000)
    assert "".join(part["text_output"] for part in parts) == ("abcdefg" * 500)[:3000]
    assert sum(part["num_output_tokens"] for part in parts) == 3000
    assert [part.get("finish_reason") for part in parts[-1:]] == ["length"]
    assert len(parts) < 1000  # tokens come joined


def test_choices_of_a_stream_are_told_apart(mounted):
    texts = ["", ""]
    for part in stream(mounted, text_input="abc", max_tokens=100, n=2, seed=0):
        texts[part["index"]] += part["text_output"]
    assert texts == [("abc" * 40)[:100], ("bca" * 40)[:100]]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stop_string_ends_the_text_and_the_work(mounted, streaming):
    body = {"text_input": "abcdefg", "sampling_parameters": sampling(stop=["ga"], max_tokens=9999)}
    parts = stream(mounted, **body) if streaming else [generate(mounted, **body)[1]]
    assert "".join(part["text_output"] for part in parts) == "abcdef"
    assert parts[-1]["finish_reason"] == "stop"
    mounted.engine.wait_for(lambda engine: not engine.live_ids)


def test_http_and_grpc_share_a_batch(mounted):
    engine = mounted.engine
    grpc_streams = [GrpcStream(mounted.grpc) for _ in range(8)]
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(generate(mounted, text_input="abc", max_tokens=50))
        )
        for _ in range(8)
    ]
    engine.pause()
    for grpc_stream in grpc_streams:
        grpc_stream.ask(
            text_input=b"xyz", stream=True, sampling_parameters=sampling(max_tokens=50).encode()
        )
    for thread in threads:
        thread.start()
    engine.wait_for(lambda engine: len(engine.live_ids) == 16)
    engine.release()
    for grpc_stream in grpc_streams:
        text = b"".join(result.as_numpy("text_output")[0] for result in grpc_stream.results())
        assert text.decode() == ("xyz" * 20)[:50]
        grpc_stream.close()
    for thread in threads:
        thread.join()
    assert [answer["text_output"] for _, answer in answers] == [("abc" * 20)[:50]] * 8


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "exactly one of text_input"),
        ({"text_input": "a", "input_ids": [1]}, "not text_input and input_ids"),
        ({"text_input": ""}, "must not be empty"),
        ({"input_ids": [600]}, "token id 600"),
        ({"messages": "{}"}, "messages must be JSON text of an array"),
        ({"text_input": "a", "sampling_parameters": "[1]"}, "must be JSON text of an object"),
        ({"text_input": "a", "temprature": 1}, "did you mean 'temperature'"),
        ({"text_input": "a", "sampling_parameters": '{"top_p": 2}'}, "top_p"),
        ({"text_input": "a", "sampling_parameters": '{"top_p": "x"}'}, "top_p must be a number"),
        ({"text_input": "a", "sampling_parameters": '{"stop_token_ids": 5}'}, "wrong type"),
        ({"text_input": "a", "n": 1000}, "n may have at most 128"),
        ({"text_input": "a", "logprobs": 2}, "logprobs cannot be asked for"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong_and_nothing_else(mounted, body, says):  # D4
    status, answer = generate(mounted, **body)
    assert status == 400
    assert says in answer["error"]
    for inner in ("Traceback", ".py", mounted.engine.info.model):
        assert inner not in answer["error"]
    assert generate(mounted, text_input="ok", max_tokens=2)[1]["text_output"] == "ok"


def test_an_error_on_grpc_has_a_code_and_no_traceback(mounted):  # D4
    grpc_stream = GrpcStream(mounted.grpc)
    grpc_stream.ask(text_input=b"\xff\xfe", stream=True)
    with pytest.raises(InferenceServerException, match="text_input must be UTF-8") as caught:
        list(grpc_stream.results())
    for inner in ("Traceback", ".py", mounted.engine.info.model):
        assert inner not in str(caught.value)
    grpc_stream.close()


def test_a_failing_sequence_is_an_error(mounted):
    mounted.engine.fail_running("no numbers came out")
    status, answer = generate(mounted, text_input="abc")
    assert status >= 400
    assert "no numbers came out" in answer["error"]


def test_an_unexpected_error_keeps_its_details_in_the_log(mounted, monkeypatch, caplog):  # D4
    def fail(*_):
        raise KeyError("/secret/path")

    monkeypatch.setattr(completions.tensors, "read", fail)
    status, answer = generate(mounted, text_input="abc")
    assert status >= 400
    assert "secret" not in json.dumps(answer)
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize("waits", [False, True], ids=["streaming", "without-output"])
def test_a_cancelled_grpc_stream_frees_its_sequences(mounted, waits):
    engine = mounted.engine
    num_aborted = len(engine.aborted)
    if waits:
        engine.pause()
    grpc_stream = GrpcStream(mounted.grpc)
    params = sampling(max_tokens=1 << 20, n=2).encode()
    grpc_stream.ask(text_input=b"abc", stream=True, sampling_parameters=params)
    engine.wait_for(lambda engine: len(engine.live_ids) == 2)
    if not waits:
        next(grpc_stream.results())
    grpc_stream.close(cancel=True)
    engine.wait_for(lambda engine: not engine.live_ids)
    engine.release()
    assert len(engine.aborted) == num_aborted + 2


def test_a_disconnect_from_http_frees_its_sequence(mounted):
    connection, answer = post(
        mounted.http,
        {"text_input": "abc", "stream": True, "max_tokens": 1 << 20},
        "generate_stream",
    )
    assert answer.readline().startswith(b"data: ")
    answer.close()
    connection.close()
    mounted.engine.wait_for(lambda engine: not engine.live_ids)


def test_streams_that_are_left_at_any_moment_leave_triton_as_it_was(mounted):  # D2, D3
    chance = random.Random(0)

    def leave(_):
        body = {"text_input": "abc", "stream": True, "max_tokens": chance.randrange(1, 40)}
        connection = http.client.HTTPConnection(mounted.http, timeout=60)
        connection.request("POST", "/v2/models/fake/generate_stream", json.dumps(body))
        answer = connection.getresponse()
        for _ in range(chance.randrange(4)):  # the last one may have come already
            answer.readline()
        connection.close()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, range(300)))
    mounted.engine.wait_for(lambda engine: not engine.live_ids)
    assert generate(mounted, text_input="abc", max_tokens=3)[1]["text_output"] == "abc"


def test_a_reader_that_does_not_read_harms_nobody(mounted):  # D15
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            body = {"text_input": "abc", "stream": True, "max_tokens": 1 << 16}
            connection, _ = post(mounted.http, body, "generate_stream")
            stack.enter_context(closing(connection))
        for _ in range(8):
            assert generate(mounted, text_input="abc", max_tokens=3)[1]["text_output"] == "abc"
        # What is too far behind is given up: nothing is kept for it without limit.
        mounted.engine.wait_for(lambda engine: not engine.live_ids)


def test_where_keys_are_asked_for_each_door_wants_one(mount):
    with mount(api_key=("first", "second")) as mounted:
        for wrong in ({}, {"api_key": "third"}, {"api_key": 1}, {"api_key": ""}):
            status, answer = generate(mounted, text_input="abc", **wrong)
            assert status == 400
            assert "API key" in answer["error"]
        assert generate(mounted, text_input="abc", max_tokens=1, api_key="second")[0] == 200
        for headers in ({}, {"authorization": "Bearer third"}, {"authorization": "Bearer "}):
            with closing(GrpcStream(mounted.grpc, headers)) as grpc_stream:
                grpc_stream.ask(text_input=b"abc", stream=True)
                with pytest.raises(InferenceServerException, match="API key"):
                    list(grpc_stream.results())
        assert mounted.engine.num_added == 1
        for headers in ({"authorization": "Bearer first"}, {"x-api-key": "second"}):
            with closing(GrpcStream(mounted.grpc, headers)) as grpc_stream:
                grpc_stream.ask(text_input=b"abc", stream=True)
                assert list(grpc_stream.results())
