"""Whether the fields of a declaration hold what their types say."""

import math
import operator
import os
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pagedcore.errors import ConfigError


def check_types(declared: Any) -> None:
    """Raise ConfigError for a field of a dataclass whose value its type does not allow.

    A path is taken as text, a text or a list as a tuple of texts, and a whole number as a float.
    """
    for name, hint in get_type_hints(type(declared)).items():
        value, kinds = getattr(declared, name), get_args(hint)
        is_optional = NoneType in kinds
        if value is None and is_optional:
            continue
        kind = kinds[0] if is_optional else hint
        converted = _converted(kind, value)
        if converted is None:
            allowed = _in_words(kind) + (" or None" if is_optional else "")
            raise ConfigError(f"{name} must be {allowed}, not {value!r}")
        object.__setattr__(declared, name, converted)


def _converted(kind: Any, value: Any) -> Any:
    """A value as its field holds it; None when it is of no use there."""
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else None
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        is_list = isinstance(items, list | tuple) and all(isinstance(item, str) for item in items)
        return tuple(items) if is_list else None
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is int and hasattr(value, "__index__"):
        return operator.index(value)
    if kind is float and isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if isinstance(value, kind) else None


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return "a list of texts"
    return {bool: "True or False", int: "a whole number", float: "a number"}.get(kind, "a text")
