"""The reference page of every setting, from the declarations: python -m pagedcore.cli.reference.

The page is `docs/configuration.md`; a test compares the two.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pagedcore.cli.flags import field_docs
from pagedcore.config import DEPRECATED, EngineConfig, Usage
from pagedcore.presets import PRESETS
from pagedcore.request import SamplingParams
from pagedcore.server_config import API_KEY_VARIABLE, ServerConfig
from pagedcore.sources.cache import VARIABLE as CACHE_VARIABLE

HEAD = """\
# Configuration

Every setting is declared once, in
[`pagedcore/config.py`](../pagedcore/config.py),
[`pagedcore/server_config.py`](../pagedcore/server_config.py) and
[`pagedcore/request.py`](../pagedcore/request.py). This page is printed from there by
`python -m pagedcore.cli.reference`: change the declaration, not the page.

A setting `max_num_seqs` is the flag `--max-num-seqs` and the keyword `max_num_seqs`. On the command
line, whole numbers take a suffix: `k`, `m`, `g` are decimal (`1.5k` is 1500), `K`, `M`, `G` binary
(`32K` is 32768). A flag that is on or off has a twin that says the opposite: `--no-...`. Where a
flag takes several values, give it several times. An unknown name ends the start and names the
nearest.

## The engine

For `pagedcore serve`, `generate`, `chat` and most of `bench`; as keywords for `LLM(...)` and
`EngineConfig.from_options(...)`. `generate` and `chat` call the engine's seed `--engine-seed`,
because `--seed` is the request's there.
"""

DEFAULTS = """\
### Defaults that depend on the device

What is not set is settled when the model is loaded. An explicit value is never changed; a default
moves, where another setting needs it to.
"""

PRESET = """\
### Presets

What `--preset` sets. A flag that is given wins over it, and it wins over the device's defaults.
See [planning.md](planning.md#presets).
"""

SERVER = """\
## The server

For `pagedcore serve`; as keywords for `ServerConfig(...)`, which a mount in a program of your own
takes. What they do together stands in [serving.md](serving.md).
"""

SAMPLING = """\
## Sampling

Fields of a request's body, keywords of `SamplingParams(...)`, and flags of `generate` and `chat`. A
model's `generation_config.json` may set other defaults (`--generation-config none` ignores it).
"""

ENVIRONMENT = f"""\
## Environment

| Variable | Meaning |
|---|---|
| `{API_KEY_VARIABLE}` | API keys, separated by commas; used unless `--api-key` is given |
| `{CACHE_VARIABLE}` | Folder for downloaded and converted models, by default `~/.cache/pagedcore` |
| `OPENAI_API_KEY` | The key that `pagedcore bench serve` presents |
"""

PAST = """\
## Names of the past

Accepted with a warning, and without effect.
"""

DEVICES: tuple[tuple[str, float | None, bool], ...] = (
    ("CPU", None, False),
    ("GPU below 70 GiB, or any A100", 24.0, False),
    ("GPU of 70 GiB or more", 80.0, False),
    ("GPU of 160 GiB or more", 180.0, False),
)
_ANY_LENGTH = 4096

Row = Sequence[str]


def page() -> str:
    """The whole page, in Markdown."""
    parts = [HEAD]
    for section in fields(EngineConfig):
        declaration: Any = section.default_factory
        parts.append(f"### {section.name.capitalize()}\n\n{_flags(declaration)}")
    parts.append(f"{DEFAULTS}\n{_device_defaults()}")
    parts.append(f"{PRESET}\n{_presets()}")
    parts.append(f"{SERVER}\n{_flags(ServerConfig)}")
    parts.append(f"{SAMPLING}\n{_sampling()}")
    parts.append(ENVIRONMENT)
    parts.append(f"{PAST}\n{_past()}")
    return "\n".join(parts)


def _flags(declaration: type) -> str:
    rows = []
    for name, kind, default, meaning in _declared(declaration):
        flag = f"`--{_dashed(name)}`"
        rows.append((flag, kind, default, meaning))
    return _table(("Flag", "Takes", "Default", "Meaning"), rows)


def _sampling() -> str:
    rows = [(f"`{name}`", *rest) for name, *rest in _declared(SamplingParams)]
    return _table(("Field", "Takes", "Default", "Meaning"), rows)


def _past() -> str:
    rows = [(f"`--{_dashed(name)}`", about) for name, about in DEPRECATED.items()]
    return _table(("Flag", "Remark"), rows)


def _device_defaults() -> str:
    """What `EngineConfig.resolve` settles, for one device of each class."""
    rows = []
    for device, gib, is_a100 in DEVICES:
        row = [device]
        usages: tuple[Usage, ...] = ("offline", "serve")
        for usage in usages:
            settled = EngineConfig().resolve(
                usage=usage,
                device_memory_gib=gib,
                is_a100=is_a100,
                max_model_len=_ANY_LENGTH,
                block_size=16,
            )
            row.append(str(settled.scheduler.max_num_batched_tokens))
        row.insert(1, str(settled.scheduler.max_num_seqs))
        rows.append(row)
    tokens = "`max_num_batched_tokens`"
    return _table(("Device", "`max_num_seqs`", f"{tokens}, offline", f"{tokens}, `serve`"), rows)


def _presets() -> str:
    rows = []
    for name, preset in PRESETS.items():
        settings = ", ".join(f"`{key}={value}`" for key, value in preset.settings.items())
        rows.append((f"`{name}`", settings or "nothing", preset.about))
    return _table(("Preset", "Sets", "For"), rows)


def _declared(declaration: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each field."""
    hints, docs = get_type_hints(declaration), field_docs(declaration)
    for declared in fields(declaration):
        hint = hints[declared.name]
        yield declared.name, _kind(hint), _default(declared), docs[declared.name]


def _kind(hint: Any) -> str:
    """A type in a reader's words."""
    members = [member for member in get_args(hint) if member is not NoneType]
    kind = members[0] if NoneType in get_args(hint) else hint
    origin = get_origin(kind) or kind
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if hasattr(kind, "__members__"):  # an enumeration
        return ", ".join(f"`{member.value}`" for member in kind)
    words = {str: "text", int: "whole number", float: "number", bool: "on or off"}
    if origin in words:
        return words[origin]
    if origin is tuple or origin is Sequence:
        item = {str: "texts", int: "whole numbers"}[get_args(kind)[0]]
        return f"one or more {item}"
    return "an object"


def _default(declared: "Field[Any]") -> str:
    value = declared.default
    if value is MISSING or value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{value}`"


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _table(head: Row, rows: Iterable[Row]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
