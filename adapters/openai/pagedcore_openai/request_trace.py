"""What a span tells of one inference request (LIFE-6); it knows no tracing library.

The names are those of vLLM's spans and of OpenTelemetry's conventions for generative AI. No text
is among them: no prompt, no output, and no error message, which may repeat a field of the body.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

from pagedcore.errors import OverloadedError
from pagedcore.request import FinishReason
from pagedcore_openai.answer import Answer
from pagedcore_openai.errors import as_api_error
from pagedcore_openai.gate import ARRIVAL, REQUEST_ID, TRACE
from pagedcore_openai.vector_answer import VectorAnswer

Attributes = dict[str, bool | int | float | str | list[str]]

OPERATIONS: Mapping[str, str | None] = {
    "chat/completions": "chat",
    "completions": "text_completion",
    "responses": "chat",
    "embeddings": "embeddings",
    "score": "score",
    "rerank": "rerank",
    "invocations": None,
}
"""How the paths that are traced end, the longer ones first, and what is done there."""

_TRACE_HEADERS = (b"traceparent", b"tracestate")


def traced_operation(path: str) -> tuple[bool, str | None]:
    """Whether requests to a path are traced, and what they do where the path tells."""
    for ending, operation in OPERATIONS.items():
        if path.endswith("/" + ending):
            return True, operation
    return False, None


def trace_of(request: Request) -> "RequestTrace | None":
    """What is told of a request; None where nothing is traced."""
    trace: RequestTrace | None = request.scope["state"].get(TRACE)
    return trace


class RequestTrace:
    """Collects what is known of one request until its span is made, which is when it is over."""

    def __init__(self, scope: Scope, operation: str | None) -> None:
        """`scope` has passed the gate."""
        self._scope = scope
        self._operation = operation
        self._model: str | None = None
        self._answer: Answer | VectorAnswer | None = None
        self.arrival: float = scope["state"][ARRIVAL]
        self.status: int | None = None
        """Of the HTTP answer, once it has begun."""
        self.work: asyncio.Task[Any] | None = None
        """What goes on after the HTTP answer, if anything does."""

    def asked(self, model: str, answer: Answer | VectorAnswer) -> None:
        """The request is in order: this is what answers it."""
        self._model = model
        self._answer = answer

    @property
    def headers(self) -> dict[str, str]:
        """Those that name the caller's span, by lower-case name; the first of each counts."""
        found: dict[str, str] = {}
        for name, value in self._scope["headers"]:
            if name in _TRACE_HEADERS:
                found.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        return found

    @property
    def error_type(self) -> str | None:
        """The status of what the server has failed with, also in a stream; None for no failure."""
        status = self._failure or self.status or 0
        return str(status) if status >= 500 else None

    @property
    def _failure(self) -> int | None:
        """The status of what the server has failed with after the engine had taken the request.

        A client that does not read, or whose own deadline is over, is no failure.
        """
        failure = self._answer.failure if isinstance(self._answer, Answer) else None
        if failure is None:
            return None
        if isinstance(failure, OverloadedError) and failure.reason == "slow_reader":
            return None
        status = as_api_error(failure, admitted=True).status
        return status if status >= 500 else None

    def attributes(self) -> Attributes:
        """All that is known, at the end."""
        found: Attributes = {"gen_ai.request.id": self._scope["state"][REQUEST_ID]}
        if self._operation is not None:
            found["gen_ai.operation.name"] = self._operation
        if self._model is not None:
            found["gen_ai.request.model"] = self._model
        if self.status is not None:
            found["http.response.status_code"] = self.status
        if self.error_type is not None:
            found["error.type"] = self.error_type
        if isinstance(self._answer, Answer):
            found |= _asked_for(self._answer)
            if self._answer.is_admitted:
                found |= self._outcome(self._answer)
        elif self._answer is not None and self.status == 200:
            found["gen_ai.usage.prompt_tokens"] = self._answer.num_prompt_tokens
        return found

    def _outcome(self, answer: Answer) -> Attributes:
        left = FinishReason.ABORT if self._failure is None else FinishReason.ERROR
        reasons = answer.finish_reasons | dict.fromkeys(answer.live, left)
        return {
            "gen_ai.usage.prompt_tokens": answer.usage.prompt_tokens,
            "gen_ai.usage.completion_tokens": answer.usage.completion_tokens,
            "gen_ai.usage.num_sequences": len(reasons),
            "gen_ai.response.finish_reasons": [str(reasons[index]) for index in sorted(reasons)],
            **_latencies(answer, self.arrival),
        }


def _asked_for(answer: Answer) -> Attributes:
    """The sampling parameters as they are used."""
    params = answer.params
    found: Attributes = {
        "gen_ai.request.n": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
    }
    if params.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = params.max_tokens
    return found


def _latencies(answer: Answer, arrival: float) -> Attributes:
    """The times of METRIC-6, in seconds; of several prompts, from the first to the last event."""
    timings = answer.timings
    queued = [t.queue_seconds for t in timings if t.queue_seconds is not None]
    scheduled = [t.scheduled_at for t in timings if t.scheduled_at is not None]
    firsts = [t.first_at for t in timings if t.first_at is not None]
    lasts = [t.last_at for t in timings if t.last_at is not None]
    found: Attributes = {}
    if queued:
        found["gen_ai.latency.time_in_queue"] = min(queued)
    if firsts:
        first, last = min(firsts), max(lasts)
        found["gen_ai.latency.time_to_first_token"] = first - arrival
        found["gen_ai.latency.e2e"] = last - arrival
        found["gen_ai.latency.time_in_model_decode"] = last - first
        if scheduled:
            prefill = max(0.0, first - min(scheduled))
            found["gen_ai.latency.time_in_model_prefill"] = prefill
            found["gen_ai.latency.time_in_model_inference"] = prefill + last - first
    return found
