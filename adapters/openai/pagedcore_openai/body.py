"""JSON bodies as strangers send them, and the fields in them that have no effect."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn
from urllib.parse import quote

from pagedcore.errors import RequestError
from pagedcore.server_config import ServerConfig
from pagedcore_openai.protocol import Fields

MAX_HEADER_BYTES = 4096
"""Longest list of ignored fields in a header (REQ-4)."""

_NESTED: dict[str, frozenset[str]] = {
    "stream_options": frozenset({"include_usage", "continuous_usage_stats"}),
    "response_format": frozenset({"type", "json_schema"}),
    "tool_choice": frozenset({"type", "function"}),
}
_TOOL = frozenset({"type", "function"})
_FUNCTION = frozenset({"name", "description", "parameters", "strict"})


def parse_object(body: bytes, max_depth: int, max_values: int) -> dict[str, Any]:
    """The JSON object of a body; raises RequestError for anything else (REQ-5).

    So it does for brackets that stand more than `max_depth` deep within each other, and for more
    than `max_values` commas: a long list is parsed in one go, while nothing else can run.
    """
    if body.count(b",") > max_values:
        raise RequestError(f"the body may have at most {max_values} commas: send less at once")
    try:
        value = json.loads(
            body.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError:
        raise RequestError("the body must be UTF-8") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(value)}")
    _check_depth(value, max_depth)
    return value


def _check_depth(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        items = [item for c in level for item in (c.values() if isinstance(c, dict) else c)]
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise RequestError(f"the body is nested too deeply: {max_depth} levels are allowed")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RequestError(f"the body has the key {twice[:80]!r} twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"the body holds {name}, which is no JSON number")


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def check_sizes(body: Mapping[str, Any], server: ServerConfig) -> None:
    """Refuse lists above a cap before anything looks at their elements (LIMIT-1)."""
    caps = {
        "stop": server.max_stop_strings,
        "bad_words": server.max_bad_words,
        "logit_bias": server.max_logit_bias,
    }
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        caps["prompt"] = server.max_prompts_per_request
    for name, cap in caps.items():
        value = body.get(name)
        if isinstance(value, list | dict) and len(value) > cap:
            raise RequestError(f"{name} may have at most {cap} entries, not {len(value)}", name)


def unknown_paths(body: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Fields that mean nothing here, as sorted paths (REQ-4)."""
    paths = [name for name in body if name not in known]
    for name, inner in _NESTED.items():
        paths += _unknown_in(body.get(name), inner, f"{name}.")
    tools = body.get("tools")
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        paths += _unknown_in(tool, _TOOL, f"tools[{i}].")
        if isinstance(tool, dict):
            paths += _unknown_in(tool.get("function"), _FUNCTION, f"tools[{i}].function.")
    return sorted(map(_printable, paths))


def ignored_paths(body: Mapping[str, Any], kind: type[Fields], *, strict: bool) -> list[str]:
    """What the header of ignored fields lists; raises RequestError for the unknown if `strict`."""
    unknown = unknown_paths(body, kind.model_fields.keys() | kind.NO_EFFECT)
    if strict and unknown:
        raise RequestError(f"unknown field {unknown[0][:200]}", unknown[0][:200])
    return sorted([*unknown, *(name for name in body if name in kind.NO_EFFECT)])


def header_list(paths: list[str]) -> str:
    """Paths as a header's value; above 4096 bytes it ends at a whole name and `,...`."""
    text = ",".join(paths)
    if len(text) <= MAX_HEADER_BYTES:
        return text
    return text[: text.rfind(",", 0, MAX_HEADER_BYTES - 3) + 1] + "..."


def _unknown_in(value: object, known: frozenset[str], prefix: str) -> list[str]:
    return [prefix + key for key in value if key not in known] if isinstance(value, dict) else []


def _printable(path: str) -> str:
    return re.sub(
        r"[^A-Za-z0-9_.\[\]-]", lambda m: quote(m[0], safe="", errors="backslashreplace"), path
    )
