"""What every inference route does first: read a body, check its fields, hand it to the engine."""

from collections.abc import Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from pagedcore.text.inputs import EngineInput
from pagedcore_openai import prepare
from pagedcore_openai.answer import Answer
from pagedcore_openai.body import check_sizes, header_list, ignored_paths, parse_object
from pagedcore_openai.errors import ApiError
from pagedcore_openai.gate import ARRIVAL, DEADLINE, KEY, REQUEST_ID, owner_of, valid_request_id
from pagedcore_openai.protocol import Fields, GenerationRequest
from pagedcore_openai.request_trace import trace_of
from pagedcore_openai.surface import Surface

Kind = TypeVar("Kind", bound=Fields)

_LARGE_BODY_BYTES = 1 << 16
"""Bodies above this are parsed outside the event loop."""

ABORT = "pagedcore.abort"
"""The scope extension that closes a connection at once: see `http_protocol`."""


class Intake:
    """Takes requests in for one surface."""

    def __init__(self, surface: Surface) -> None:
        self._surface = surface

    async def body(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request, when work is taken at all."""
        self._surface.start()
        self._surface.check_open_for_work()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind and kind != "application/json" and not kind.endswith("+json"):
            raise ApiError(415, f"the body must be application/json, not {kind[:80]}")
        body = await request.body()
        server = self._surface.server
        limits = (server.max_json_depth, server.max_json_values)
        if len(body) > _LARGE_BODY_BYTES:
            return await self._surface.in_thread(parse_object, body, *limits)
        return parse_object(body, *limits)

    def checked(self, kind: type[Kind], body: dict[str, Any]) -> tuple[Kind, dict[str, str]]:
        """The fields, by type, and the header that names ignored ones (REQ-2, REQ-3)."""
        server = self._surface.server
        check_sizes(body, server)
        ignored = ignored_paths(body, kind, strict=server.strict_params)
        headers = {"x-pagedcore-ignored-params": header_list(ignored)} if ignored else {}
        return kind.model_validate(body), headers

    def check_generation(self, fields: GenerationRequest) -> str:
        """Refuse what needs no tokenizer to be refused; the model's name."""
        surface = self._surface
        model = surface.adapter_of(fields.model) or surface.check_model(fields.model)
        policy = surface.config.scheduler.scheduling_policy
        prepare.check_generation(fields, surface.server, policy)
        return model

    def answer(
        self,
        request: Request,
        fields: GenerationRequest,
        items: Sequence[EngineInput],
        headers: dict[str, str],
    ) -> Answer:
        """An answer that nothing has been done for yet; `headers` get what was adjusted (REQ-7)."""
        surface = self._surface
        used = prepare.used_max_tokens(fields, items)
        if used is not None:
            headers["x-pagedcore-adjusted-params"] = f"max_tokens={used}"
        answer = Answer(
            surface.client,
            surface.inputs.tokenizer,
            items,
            priority=fields.priority or 0,
            cache_salt=fields.cache_salt,
            owner=owner_of(request.scope["state"][KEY]),
            adapter=surface.adapter_of(fields.model),
            interval=surface.server.stream_interval,
            every_token=bool(fields.return_token_ids),
            deadline=request.scope["state"][DEADLINE],
            arrival=request.scope["state"][ARRIVAL],
            slot=surface.slot,
            on_overflow=request.scope.get("extensions", {}).get(ABORT),
        )
        trace = trace_of(request)
        if trace is not None:
            trace.asked(fields.model or surface.info.served_model_names[0], answer)
        return answer


def settled_request_id(request: Request, fields: GenerationRequest) -> str:
    """The header's, else the field's, else the one that was generated (STREAM-1)."""
    state = request.scope["state"]
    asked = valid_request_id(request.headers.get("x-request-id"))
    state[REQUEST_ID] = asked or valid_request_id(fields.request_id) or state[REQUEST_ID]
    request_id: str = state[REQUEST_ID]
    return request_id
