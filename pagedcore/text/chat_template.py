"""Conversations into prompts, by the Jinja template that comes with a model."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagedcore.errors import ConfigError, ModelError, RequestError
from pagedcore.text.folder import read_json, read_text

MAX_PROMPT_CHARS = 16 * 2**20
"""Most characters a template may produce; more is a loop gone wrong, not a prompt."""


class ChatTemplate:
    """A compiled template, or several by name.

    It runs in Jinja's immutable sandbox with what Hugging Face's templates expect: `tojson`,
    `raise_exception`, `strftime_now`, `break` and `continue`, `generation` blocks, and the special
    tokens by role. Rendering is synchronous and can be slow: keep it off an event loop.
    """

    def __init__(
        self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """Compile. `source` is a template, or templates by name: `default`, `tool_use`, ...

        Raises RequestError when it is no valid template.
        """
        named = {"default": source} if isinstance(source, str) else source
        self._special_tokens = dict(special_tokens or {})
        environment = _environment()
        self._templates: dict[str, jinja2.Template] = {}
        for name, text in named.items():
            try:
                self._templates[name] = environment.from_string(text)
            except (jinja2.TemplateError, RecursionError) as error:
                raise RequestError(
                    f"the chat template is not valid Jinja: {error}", "chat_template"
                ) from error

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        special_tokens: Mapping[str, str] | None = None,
        *,
        override: str | None = None,
    ) -> Self | None:
        """The model's template, or `override` (a template, or a file that holds one) in its place.

        None when there is neither. The model's is chat_template.jinja, with further ones in
        additional_chat_templates/, or else `chat_template` of tokenizer_config.json. Raises
        ConfigError for a bad override and ModelError for a bad template of the model.
        """
        if override is not None:
            source: str | dict[str, str] = _override(override)
            blame: type[ConfigError] | type[ModelError] = ConfigError
        else:
            source = _of_model(folder)
            blame = ModelError
            if not source:
                return None
        try:
            return cls(source, special_tokens)
        except RequestError as error:
            raise blame(f"{error}. Give another one with --chat-template.") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation.

        With `continue_final_message` it ends right after the last message's text, which the model
        goes on with. `kwargs` are variables of the template. Raises RequestError for whatever
        goes wrong in the template: its author's `raise_exception`, mostly.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt=false: "
                "a prompt cannot both go on with a message and open a new one",
                "continue_final_message",
            )
        variables: dict[str, Any] = {
            "documents": None,
            **self._special_tokens,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        text = _run(self._choose(with_tools=bool(tools)), variables)
        return _cut_after_last(text, messages) if continue_final_message else text

    def _choose(self, *, with_tools: bool) -> jinja2.Template:
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        raise RequestError(
            f"the model's chat templates are named {', '.join(sorted(self._templates))} and none "
            "is `default`: give one with --chat-template"
        )


class _Generation(Extension):
    """Accepts `{% generation %}`, which marks the model's own text for training."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _run(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    parts: list[str] = []
    num_chars = 0
    try:
        for part in template.generate(variables):
            parts.append(part)
            num_chars += len(part)
            if num_chars > MAX_PROMPT_CHARS:
                raise jinja2.TemplateError(f"more than {MAX_PROMPT_CHARS} characters of output")
    except Exception as error:  # a template can raise anything that Python can
        raise RequestError(
            f"the chat template cannot render these messages: {error}", "messages"
        ) from error
    return "".join(parts)


def _cut_after_last(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Drop what the template puts after the last message's text."""
    last = messages[-1].get("content")
    begin = text.rfind(last.strip()) if isinstance(last, str) and last.strip() else -1
    if not isinstance(last, str) or begin < 0:
        raise RequestError(
            "continue_final_message: the chat template does not show the last message's text",
            "continue_final_message",
        )
    begun = last.lstrip()  # templates strip some messages; what they kept at the end stays
    kept = begun if text.startswith(begun, begin) else last.strip()
    return text[: begin + len(kept)]


def _override(override: str) -> str:
    if "{{" in override or "{%" in override:
        return override
    try:
        return Path(override).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template must be a Jinja template or a file that holds one: {error}"
        ) from error


def _of_model(folder: Path) -> dict[str, str]:
    """Templates by name."""
    path = folder / "tokenizer_config.json"
    configured = read_json(path).get("chat_template") or []
    if isinstance(configured, str):
        configured = [{"name": "default", "template": configured}]
    try:
        named = {str(entry["name"]): str(entry["template"]) for entry in configured}
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: chat_template must be a text, or a list of objects with name and template."
        ) from error
    for extra in sorted(folder.glob("additional_chat_templates/*.jinja")):
        named[extra.stem] = read_text(extra)
    main = folder / "chat_template.jinja"
    return {**named, "default": read_text(main)} if main.is_file() else named
