"""Spans of requests, as a receiver of OTLP/HTTP gets them from every face (LIFE-6)."""

import contextlib
import gzip
import itertools
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
SECRET = "my secret"


class Receiver:
    """Listens at a port of its own, and keeps the spans that it gets, by their request's id."""

    def __init__(self):
        self.paths, self.bodies, self.services = set(), [], set()
        self._spans = {}
        self._changed = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver.take(self.path, body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, path, body):
        with self._changed:
            self.paths.add(path)
            self.bodies.append(body)
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.services.add(attributes_of(group.resource)["service.name"])
                for span in itertools.chain.from_iterable(s.spans for s in group.scope_spans):
                    self._spans.setdefault(attributes_of(span)["gen_ai.request.id"], []).append(
                        span
                    )
            self._changed.notify_all()

    def span_of(self, request_id):
        """Wait for the one span of a request."""
        with self._changed:
            assert self._changed.wait_for(lambda: request_id in self._spans, 60), request_id
            (span,) = self._spans[request_id]
            return span

    @property
    def ids(self):
        with self._changed:
            return set(self._spans)

    @contextlib.contextmanager
    def listening(self):
        thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()


def attributes_of(span):
    return {one.key: value_of(one.value) for one in span.attributes}


def value_of(value):
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(one) for one in value.array_value.values]
    return getattr(value, kind)


@pytest.fixture(scope="module")
def traced(start):
    """A server that sends its spans soon, and what receives them."""
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "50", "NO_PROXY": "127.0.0.1"}
    with Receiver().listening() as receiver:
        options = {"otlp_traces_endpoint": receiver.url, "environment": environment}
        with start(**options) as server:
            yield SimpleNamespace(server=server, receiver=receiver)


def headers_of(request_id, **more):
    return {"x-request-id": request_id, **more}


def test_a_request_leaves_one_span_below_its_callers(traced):
    asked = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "n": 2, "model": "alias"}
    answer = traced.server.complete(SECRET, headers=headers_of("plain", **PARENT), **asked)
    assert answer.status == 200
    span = traced.receiver.span_of("plain")
    assert (span.name, span.kind) == ("llm_request", Span.SPAN_KIND_SERVER)
    assert span.trace_id.hex() == TRACE_ID
    assert span.parent_span_id.hex() == PARENT_ID
    assert span.status.code == Status.STATUS_CODE_UNSET
    found = attributes_of(span)
    times = {name: found.pop(name) for name in list(found) if "latency" in name}
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": "plain",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.model": "alias",
        "gen_ai.request.n": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.completion_tokens": 6,
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.usage.prompt_tokens": len(SECRET),
        "http.response.status_code": 200,
    }
    assert {name.removeprefix("gen_ai.latency.") for name in times} == {
        "e2e",
        "time_in_model_decode",
        "time_in_model_inference",
        "time_in_model_prefill",
        "time_in_queue",
        "time_to_first_token",
    }
    first, end = times["gen_ai.latency.time_to_first_token"], times["gen_ai.latency.e2e"]
    assert 0 <= first <= end <= (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert traced.receiver.paths == {"/v1/traces"}
    assert traced.receiver.services == {"pagedcore"}


def test_a_stream_leaves_one_span_when_it_has_ended(traced):
    headers = headers_of("streamed", **PARENT)
    assert traced.server.chat(SECRET, headers=headers, stream=True).chunks
    span = traced.receiver.span_of("streamed")
    assert span.parent_span_id.hex() == PARENT_ID
    found = attributes_of(span)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.usage.completion_tokens"] == 4
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    assert found["gen_ai.latency.e2e"] >= found["gen_ai.latency.time_to_first_token"]


@pytest.mark.parametrize("header", [None, "nonsense", f"00-{'0' * 32}-{PARENT_ID}-01"])
def test_without_a_valid_caller_a_span_begins_a_trace(traced, header):
    more = {} if header is None else {"traceparent": header}
    request_id = f"root-{len(header or '')}"
    traced.server.complete(max_tokens=1, headers=headers_of(request_id, **more))
    span = traced.receiver.span_of(request_id)
    assert not span.parent_span_id
    assert span.trace_id.hex() not in (TRACE_ID, "0" * 32)


def test_what_a_caller_does_not_sample_is_not_sent(traced):
    unsampled = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    traced.server.complete(max_tokens=1, headers=headers_of("unsampled", **unsampled))
    traced.server.complete(max_tokens=1, headers=headers_of("after-unsampled"))
    traced.receiver.span_of("after-unsampled")
    assert "unsampled" not in traced.receiver.ids


def test_a_refused_request_has_a_span_without_an_outcome(traced):
    headers = headers_of("refused", **PARENT)
    assert traced.server.complete(SECRET, headers=headers, temperature=-1).status == 400
    span = traced.receiver.span_of("refused")
    assert span.parent_span_id.hex() == PARENT_ID
    assert span.status.code == Status.STATUS_CODE_UNSET  # it is the caller's error
    assert attributes_of(span) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": "refused",
        "http.response.status_code": 400,
    }


def test_a_request_that_its_client_leaves_says_so(traced):
    server = traced.server
    server.engine.hold()
    body = json.dumps({"prompt": SECRET, "max_tokens": 9, "stream": True}).encode()
    with server.connect() as link:
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: left\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        server.engine.wait_for_live(1)
        server.engine.advance(3)
        answered = b""
        while b'"text"' not in answered:
            piece = link.recv(1 << 16)
            assert piece, answered
            answered += piece
        link.shutdown(socket.SHUT_RDWR)
    server.engine.wait_for_live(0)
    server.engine.release()
    span = traced.receiver.span_of("left")
    found = attributes_of(span)
    assert found["gen_ai.response.finish_reasons"] == ["abort"]
    assert 1 <= found["gen_ai.usage.completion_tokens"] < 9
    assert span.status.code == Status.STATUS_CODE_UNSET


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_one_also_after_a_stream_has_begun(traced, stream):
    server = traced.server
    server.engine.hold()
    request_id = f"failed-{stream}"
    asked = {"headers": headers_of(request_id), "max_tokens": 9, "stream": stream}
    thread = threading.Thread(target=lambda: server.complete(SECRET, **asked))
    thread.start()
    server.engine.wait_for_live(1)
    server.engine.fail_running(f"cannot go on with {SECRET}")
    server.engine.release()
    thread.join()
    span = traced.receiver.span_of(request_id)
    found = attributes_of(span)
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert not span.status.message
    assert found["error.type"] == "500"
    assert found["http.response.status_code"] == (200 if stream else 500)
    assert found["gen_ai.response.finish_reasons"] == ["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_is_over_is_an_end_and_no_failure(traced, stream):
    server = traced.server
    server.engine.hold()
    headers = headers_of(f"late-{stream}", **{"x-request-timeout": "0.1"})
    server.complete(SECRET, headers=headers, max_tokens=9, stream=stream)
    server.engine.release()
    span = traced.receiver.span_of(f"late-{stream}")
    found = attributes_of(span)
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert found["http.response.status_code"] == (200 if stream else 408)
    assert found.get("gen_ai.response.finish_reasons") == ["abort"]
    assert "error.type" not in found


def test_work_in_the_background_has_its_span_when_it_is_done(traced):
    body = {"input": SECRET, "background": True, "max_output_tokens": 5}
    headers = headers_of("background")
    assert traced.server.request("POST", "/v1/responses", body, headers).status == 200
    found = attributes_of(traced.receiver.span_of("background"))
    assert found["gen_ai.usage.completion_tokens"] == 5
    assert found["gen_ai.response.finish_reasons"] == ["length"]


def test_vectors_have_spans_and_what_is_no_inference_has_none(traced):
    server = traced.server
    for path, body in (
        ("/tokenize", {"prompt": SECRET}),
        ("/v1/embeddings", {"input": SECRET}),
    ):
        assert server.request("POST", path, body, headers_of(path[-8:])).status == 200
    assert server.get("/v1/models", **headers_of("models")).status == 200
    assert attributes_of(traced.receiver.span_of("beddings")) == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.request.id": "beddings",
        "gen_ai.request.model": "fake",
        "gen_ai.usage.prompt_tokens": len(SECRET),
        "http.response.status_code": 200,
    }
    assert not traced.receiver.ids & {"tokenize", "models"}


def test_the_last_spans_are_sent_before_the_server_ends_and_none_has_text(traced):
    # Last: it ends the server that the others share.
    traced.server.complete(SECRET, max_tokens=1, headers=headers_of("last"))
    assert traced.server.stop() == 0
    assert "last" in traced.receiver.ids
    assert not [body for body in traced.receiver.bodies if SECRET.encode() in body]
    assert SECRET not in traced.server.log.read_text()
