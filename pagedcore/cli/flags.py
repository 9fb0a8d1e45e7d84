"""Command-line flags from declarations: name, type, default and help of a field are the flag's."""

import ast
import functools
import inspect
import itertools
import json
import logging
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from fractions import Fraction
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token

from pagedcore.config import DEPRECATED, EngineConfig

logger = logging.getLogger(__name__)

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_RULES = re.compile(r" \((?:semantics )?[A-Z]+-\d+(?:, [A-Z]+-\d+)*\)")
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_DEPRECATED_WITH_VALUE = {
    "swap_space",
    "num_scheduler_steps",
    "max_seq_len_to_capture",
    "preemption_mode",
}

Command = Callable[..., int]


def parse_count(text: str) -> int:
    """A whole number with an optional suffix: k m g are decimal, K M G binary (CFG-1).

    Raises ValueError, saying what is allowed.
    """
    match = re.fullmatch(r"(-?\d+)|(\d*\.?\d+)([kmgKMG])", text)
    if match is None:
        raise ValueError(f"{text!r} is not a whole number; 1.5k is 1500, 32K is 32768")
    if match[1]:
        return int(match[1])
    count = Fraction(match[2]) * _SUFFIXES[match[3]]
    if count.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number")
    return count.numerator


def parameters(
    declaration: type,
    *,
    skip: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    listed: Collection[str] = (),
) -> list[inspect.Parameter]:
    """A flag for each field of a dataclass, but those to `skip`.

    `rename` gives another name; `defaults` is for commands that have their own. Those that are
    `listed` take all values that follow them: for commands without other arguments.
    """
    hints, docs = get_type_hints(declaration), field_docs(declaration)
    group = Group(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", declaration.__name__.removesuffix("Config")))
    flags = []
    for declared in fields(declaration):
        if declared.name in skip:
            continue
        name = (rename or {}).get(declared.name, declared.name)
        kind, converter = _flag_type(declared.name, hints[declared.name])
        default = (defaults or {}).get(declared.name, _default(declared))
        about = Parameter(
            help=docs.get(declared.name),
            group=group,
            converter=converter,
            show_default=default not in (None, ()),
            consume_multiple=declared.name in listed,
        )
        flags.append(
            inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[kind, about])
        )
    return flags


def engine_parameters(rename: Mapping[str, str] | None = None) -> list[inspect.Parameter]:
    """The flags of an engine, without the model; and those of the past, which nobody is shown."""
    flags = [
        flag
        for section in fields(EngineConfig)
        for flag in parameters(section.default_factory, skip={"model"}, rename=rename)  # type: ignore[arg-type]
    ]
    hidden = Parameter(show=False, allow_leading_hyphen=True)
    for name in DEPRECATED:
        kind: Any = str | None if name in _DEPRECATED_WITH_VALUE else bool
        default = None if name in _DEPRECATED_WITH_VALUE else False
        annotation = Annotated[kind, hidden]
        flags.append(inspect.Parameter(name, _KEYWORD, default=default, annotation=annotation))
    return flags


def command(flags: Sequence[inspect.Parameter]) -> Callable[[Command], Command]:
    """Replace a command's `**options` by these flags; it is called with those given, by name.

    Flags of the past are dropped with one warning each (LEG-2).
    """

    def decorate(function: Command) -> Command:
        own = [
            p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD
        ]
        signature = inspect.Signature([*own, *flags])

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> int:
            given = signature.bind(*args, **options).arguments
            for name in [name for name in given if name in DEPRECATED]:
                del given[name]
                logger.warning("--%s is deprecated: %s", _dashed(name), DEPRECATED[name])
            return function(**given)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def take(options: dict[str, Any], declaration: type, skip: Collection[str] = ()) -> dict[str, Any]:
    """Remove the options that are fields of a dataclass, and return them."""
    names = {declared.name for declared in fields(declaration)} - set(skip)
    return {name: options.pop(name) for name in list(options) if name in names}


def field_docs(declaration: type) -> dict[str, str]:
    """The docstring under each field, without rule numbers, as one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(declaration)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: _RULES.sub("", " ".join(doc.value.value.split()))
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }


def _default(declared: "Field[Any]") -> Any:
    """What stands in the help; an option that is not given never reaches the command."""
    return () if declared.default is MISSING else declared.default


def _flag_type(name: str, hint: Any) -> tuple[Any, Callable[..., Any] | None]:
    """The type that a flag shows, and how its text is read where cyclopts' own way is not ours."""
    members = [member for member in get_args(hint) if member is not NoneType]
    is_optional = NoneType in get_args(hint)
    kind = members[0] if is_optional else hint
    origin = get_origin(kind) or kind
    if kind is int:
        converter = _read_length if name == "max_model_len" else _read_count
        return (int | None if is_optional else int), converter
    if origin in (str, bool, float, Literal):
        return hint, None
    if origin is tuple or origin is Sequence:
        several: Any = tuple[get_args(kind)[0], ...]  # type: ignore[misc]
        return (several | None if is_optional else several), None
    return Any, functools.partial(_read_json, kind)


def _read_count(kind: Any, tokens: Sequence[Token]) -> int:
    return parse_count(tokens[0].value)


def _read_length(kind: Any, tokens: Sequence[Token]) -> int:
    return -1 if tokens[0].value == "auto" else parse_count(tokens[0].value)


def _read_json(wanted: Any, kind: Any, tokens: Sequence[Token]) -> Any:
    try:
        value = json.loads(tokens[0].value)
    except ValueError as error:
        raise ValueError(f"{tokens[0].value!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, not {tokens[0].value!r}")
    if get_origin(wanted) is not None:  # a mapping, which its owner checks
        return value
    try:
        return wanted(**value)
    except TypeError as error:
        raise ValueError(str(error).replace(f"{wanted.__name__}.__init__() ", "")) from None


def _dashed(name: str) -> str:
    return name.replace("_", "-")
