"""Everything pagedcore raises on purpose.

PagedcoreError
├── ConfigError             a setting is out of range, or two settings disagree
├── PluginError             a plugin cannot be loaded, or two plugins collide
├── UnknownNameError        nothing installed provides the name that was asked for
├── ModelError              a model's files are missing, broken or not what they claim
├── RequestError            a request is invalid: the caller's mistake (HTTP 400)
│   └── MissingError        what it names is not there (HTTP 404)
├── OverloadedError         the queue is full, or the engine is not taking work (HTTP 503)
└── EngineDeadError         the engine failed; no request can be served (HTTP 503, 500)
"""

from collections.abc import Iterable
from difflib import get_close_matches


class PagedcoreError(Exception):
    """Root of the tree: catch it at a process boundary, never inside the core."""


class ConfigError(PagedcoreError, ValueError):
    """A setting is out of range, or two settings disagree."""


class PluginError(PagedcoreError):
    """A plugin cannot be loaded, or two plugins collide."""


class UnknownNameError(PagedcoreError, LookupError):
    """Nothing installed provides the name that was asked for."""

    def __init__(self, kind: str, name: str, installed: Iterable[str]) -> None:
        names = sorted(installed)
        close = get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "install a plugin that provides it."
        super().__init__(
            f"no {kind} is named {name!r}: {hint} "
            f"Installed: {', '.join(names) or 'none'} (see `pagedcore plugins list`)."
        )


class ModelError(PagedcoreError):
    """A model's files are missing, broken or not what they claim to be."""


class RequestError(PagedcoreError, ValueError):
    """A request is invalid. `param` names the offending field, where one field is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MissingError(RequestError):
    """What a request names is not there."""


class OverloadedError(PagedcoreError):
    """The engine takes no more work now. `retry_after_s` says when to ask again."""

    def __init__(self, message: str, reason: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class EngineDeadError(PagedcoreError):
    """The engine failed or its process ended; nothing in flight can finish."""
