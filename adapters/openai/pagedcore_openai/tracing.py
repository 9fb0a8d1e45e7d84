"""Sends a span per inference request to an OTLP/HTTP receiver (LIFE-6).

What it needs is an extra, so nothing imports this module unless `otlp_traces_endpoint` is set. The
provider is our own: what the process around us traces, and with what, stays as it is.
"""

import asyncio
import logging
import threading
import time
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedcore_openai.gate import TRACE
from pagedcore_openai.request_trace import RequestTrace, traced_operation
from pagedcore_openai.timing import now

logger = logging.getLogger("pagedcore.server")

SPAN_NAME = "llm_request"

FLUSH_S = 2.0
"""Seconds that the end of a server waits for its last spans to be taken."""

_UNNAMED = "unknown_service"


class Tracing:
    """Makes the spans of one surface, and hands them to a thread that sends them.

    The variables OTEL_* of OpenTelemetry hold for all but the address.
    """

    def __init__(self, endpoint: str) -> None:
        """Nothing runs before `start`."""
        self._endpoint = with_path(endpoint)
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        self._propagator = TraceContextTextMapPropagator()

    def start(self) -> None:
        """Begin to send, in the process that serves."""
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith(_UNNAMED):
            resource = resource.merge(Resource({SERVICE_NAME: "pagedcore"}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(self._endpoint)))
        self._provider = provider
        self._tracer = provider.get_tracer("pagedcore")

    def record(self, trace: RequestTrace) -> None:
        """Make the span of a request that is over; it waits for nothing."""
        if self._tracer is None:  # refused before anything has begun
            return
        end_ns = time.time_ns()
        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._propagator.extract(trace.headers, Context()),
            kind=SpanKind.SERVER,
            attributes=trace.attributes(),
            start_time=end_ns - int((now() - trace.arrival) * 1e9),
        )
        if trace.error_type is not None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)

    async def close(self) -> None:
        """Send what is left, for `FLUSH_S` at most."""
        if self._provider is None:
            return
        # It may wait for a receiver that does not answer, so nothing must wait for this thread.
        ending = threading.Thread(
            target=self._provider.shutdown, name="pagedcore-traces", daemon=True
        )
        ending.start()
        await asyncio.to_thread(ending.join, FLUSH_S)
        if ending.is_alive():
            logger.warning("the last spans were not taken within %g s: they are lost", FLUSH_S)


class Traced:
    """ASGI middleware behind the gate: each inference request leaves a span when it is over."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and listen."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        is_traced, operation = traced_operation(scope["path"])
        if not is_traced:
            await self._app(scope, receive, send)
            return
        trace = scope["state"][TRACE] = RequestTrace(scope, operation)

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            if trace.work is None:
                self._tracing.record(trace)
            else:
                trace.work.add_done_callback(lambda _: self._tracing.record(trace))


def with_path(endpoint: str) -> str:
    """The address with the path that receivers listen at, where it has none."""
    url = urlsplit(endpoint)
    return url._replace(path="/v1/traces").geturl() if url.path in ("", "/") else endpoint
