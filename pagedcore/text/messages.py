"""Conversations as chat templates expect them: checked, text parts joined, arguments parsed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pagedcore.errors import RequestError


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """A copy of `messages` (OpenAI's chat format) that a template can render.

    The text parts of a content are joined by newlines, and a tool call's arguments become an
    object. Other keys pass through. Raises RequestError, naming the place (REQ-5).
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError("messages must be a list with at least one message", "messages")
    return [_checked(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with a role and a content", where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role must be a text such as 'user'", f"{where}.role")
    checked = dict(message)
    content = message.get("content")
    if content is None and role == "assistant":
        checked["content"] = None  # it may hold tool calls only
    else:
        checked["content"] = _text_of(content, f"{where}.content")
    if message.get("tool_calls"):
        checked["tool_calls"] = _with_arguments(message["tool_calls"], f"{where}.tool_calls")
    return checked


def _text_of(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        raise RequestError(f"{where} must be a text or a list of text parts", where)
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise RequestError(
                f"{where}[{i}] must be a part like {{'type': 'text', 'text': '...'}}: "
                "this model reads text only",
                f"{where}[{i}]",
            )
        texts.append(text)
    return "\n".join(texts)


def _with_arguments(calls: object, where: str) -> list[dict[str, Any]]:
    """Tool calls with `function.arguments` as an object: OpenAI sends it as JSON text."""
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise RequestError(f"{where} must be a list of calls", where)
    parsed: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"{where}[{i}] must be an object with a function", f"{where}[{i}]")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                place = f"{where}[{i}].function.arguments"
                raise RequestError(f"{place} must be JSON: {error}", place) from None
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed
