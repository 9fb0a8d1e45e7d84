"""The input of /v1/responses as the conversation that a chat template takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pagedcore.errors import RequestError
from pagedcore_openai.errors import ApiError
from pagedcore_openai.protocol import ChatRequest, ResponseRequest

_TEXT_PARTS = ("input_text", "output_text", "text")
_UNBUILT = ("tools", "include", "top_logprobs", "conversation", "prompt")
_ROLES = {"developer": "system"}
"""Roles that templates know by another name."""


def check_response(fields: ResponseRequest) -> None:
    """Refuse what is not built; raises ApiError 501 or RequestError."""
    for name in _UNBUILT:
        if getattr(fields, name):
            raise ApiError(501, f"{name} is not implemented for responses", name)
    if fields.tool_choice not in (None, "none", "auto"):
        raise ApiError(501, "tools are not implemented for responses", "tool_choice")
    text = fields.text
    if text is not None:
        kind = (text.get("format") or {"type": "text"}) if isinstance(text, dict) else None
        if not isinstance(kind, dict):
            raise RequestError('text must be like {"format": {"type": "text"}}', "text")
        if kind.get("type") != "text":
            raise ApiError(501, "only the text format text is implemented", "text")
    if fields.background and fields.stream:
        raise ApiError(501, "a background response cannot be streamed: poll for it", "stream")
    if fields.background and fields.store is False:
        raise RequestError("background needs store=true: it is asked for later", "store")


def input_messages(value: Any) -> list[dict[str, Any]]:
    """The messages of an input: a text, or a list of messages; raises RequestError."""
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise RequestError("input must be a text or a list of messages, and not empty", "input")
    return [_message(item, f"input[{i}]") for i, item in enumerate(value)]


@contextmanager
def renamed() -> Iterator[None]:
    """Let errors of the chat request name the fields of the response's."""
    try:
        yield
    except RequestError as error:
        for ours, theirs in (("max_completion_tokens", "max_output_tokens"), ("messages", "input")):
            if error.param is not None and error.param.startswith(ours):
                param = error.param.replace(ours, theirs, 1)
                raise RequestError(str(error).replace(ours, theirs), param) from None
        raise


def as_chat(fields: ResponseRequest, messages: list[dict[str, Any]]) -> ChatRequest:
    """The chat request that asks for the same; `messages` without the instructions."""
    if fields.instructions is not None:
        messages = [{"role": "system", "content": fields.instructions}, *messages]
    return ChatRequest(
        model=fields.model,
        messages=messages,
        max_completion_tokens=fields.max_output_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        truncate_prompt_tokens=-1 if fields.truncation == "auto" else None,
        priority=fields.priority,
        cache_salt=fields.cache_salt,
    )


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RequestError(f"{where} must be a message", "input")
    kind = item.get("type", "message")
    if kind != "message":
        raise ApiError(
            501, f"{where}: only messages are implemented, not {str(kind)[:80]}", "input"
        )
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str):
        raise RequestError(f"{where}.role must be a text", "input")
    if isinstance(content, list):
        content = "".join(_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be a text or a list of texts", "input")
    return {"role": _ROLES.get(role, role), "content": content}


def _text(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str) or part.get("type") not in _TEXT_PARTS:
        raise RequestError(f"{where} must be a text: this model reads nothing else", "input")
    return text
