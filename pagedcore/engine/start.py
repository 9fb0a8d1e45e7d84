"""How an engine is made in a process that was told its name, and how a failure is told back."""

import importlib
import logging
from typing import Self

from msgspec import Struct

from pagedcore.config import EngineConfig, Usage
from pagedcore.engine.server import ServedEngine
from pagedcore.errors import (
    ConfigError,
    EngineDeadError,
    ModelError,
    PagedcoreError,
    PluginError,
    UnknownNameError,
)

logger = logging.getLogger(__name__)

BUILD = "pagedcore.engine.build:build_engine"
"""What makes the engine, as module:function, called with the configuration and `usage=`."""

_KINDS: dict[str, type[PagedcoreError]] = {
    kind.__name__: kind for kind in (ConfigError, ModelError, PluginError, UnknownNameError)
}


class StartFailure(Struct, tag="failed", frozen=True):
    """Why an engine cannot start, as it crosses processes."""

    kind: str
    """The error's class, where the user can do something about it; else empty."""

    message: str
    """In one line."""

    @classmethod
    def of(cls, error: Exception) -> Self:
        """What is worth telling: a known error's text, and of others also the log's traceback."""
        for name, kind in _KINDS.items():
            if isinstance(error, kind):
                return cls(name, str(error))
        logger.error("the engine cannot start", exc_info=error)
        return cls("", f"the engine cannot start: {type(error).__name__}: {error}")

    def exception(self) -> PagedcoreError:
        """The error again; EngineDeadError for what was not expected."""
        kind = _KINDS.get(self.kind)
        if kind is None:
            return EngineDeadError(self.message)
        error = kind.__new__(kind, self.message)  # the message is complete: no __init__
        assert isinstance(error, PagedcoreError)
        return error


def build_by_name(build: str, config: EngineConfig, usage: Usage) -> ServedEngine:
    """Make an engine by a function that is known by name; see `BUILD`."""
    module, _, function = build.partition(":")
    engine: ServedEngine = getattr(importlib.import_module(module), function)(config, usage=usage)
    return engine
