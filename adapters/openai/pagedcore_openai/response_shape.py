"""The objects and events of /v1/responses."""

import time
from typing import Any

import msgspec

from pagedcore.request import FinishReason
from pagedcore_openai.errors import ApiError
from pagedcore_openai.pieces import Piece, Usage
from pagedcore_openai.protocol import ResponseRequest

_encode = msgspec.json.Encoder().encode


class ResponseShape:
    """What one response looks like while it comes into being: one message of one text."""

    def __init__(
        self, response_id: str, fields: ResponseRequest, model: str, max_output_tokens: int
    ) -> None:
        self.id = response_id
        self.item_id = f"msg_{response_id.removeprefix('resp_')}"
        self._created_at = int(time.time())
        self._fields = fields
        self._model = model
        self._max_output_tokens = max_output_tokens

    def body(
        self,
        status: str,
        piece: Piece | None = None,
        usage: Usage | None = None,
        error: ApiError | None = None,
    ) -> dict[str, Any]:
        """The response object."""
        fields = self._fields
        cut = piece is not None and piece.finish_reason is FinishReason.LENGTH
        if status == "completed" and cut:
            status = "incomplete"
        output = [] if piece is None else [self.item(_item_status(status), piece.text)]
        failure = None if error is None else {"code": "server_error", "message": str(error)}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "background": bool(fields.background),
            "error": failure,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": fields.instructions,
            "max_output_tokens": self._max_output_tokens,
            "metadata": fields.metadata or {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": fields.previous_response_id,
            "store": fields.store is not False,
            "temperature": fields.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": fields.top_p,
            "truncation": fields.truncation or "disabled",
            "usage": None if usage is None else _usage(usage),
        }

    def item(self, status: str, text: str | None) -> dict[str, Any]:
        """The message; without its text before there is any."""
        content = [] if text is None else [part(text)]
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }


class ResponseEvents:
    """The events of one streamed response, numbered."""

    def __init__(self, shape: ResponseShape) -> None:
        self._shape = shape
        self._number = 0
        self._place = {"item_id": shape.item_id, "output_index": 0, "content_index": 0}

    def beginning(self) -> bytes:
        """Before the first text."""
        created = self._shape.body("in_progress")
        item = self._shape.item("in_progress", None)
        return b"".join(
            [
                self._event("response.created", response=created),
                self._event("response.in_progress", response=created),
                self._event("response.output_item.added", output_index=0, item=item),
                self._event("response.content_part.added", **self._place, part=part("")),
            ]
        )

    def delta(self, text: str) -> bytes:
        """New text."""
        return self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def ending(self, body: dict[str, Any]) -> bytes:
        """After the last text: what it is in all, and the response, however it ended."""
        item = body["output"][0]
        text = item["content"][0]["text"]
        return b"".join(
            [
                self._event("response.output_text.done", **self._place, text=text, logprobs=[]),
                self._event("response.content_part.done", **self._place, part=part(text)),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{body['status']}", response=body),
            ]
        )

    def failure(self, body: dict[str, Any]) -> bytes:
        """The end of a response that failed."""
        return self._event("response.failed", response=body)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = _encode({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def part(text: str) -> dict[str, Any]:
    """A text as a part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item_status(status: str) -> str:
    return status if status in ("in_progress", "completed") else "incomplete"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
