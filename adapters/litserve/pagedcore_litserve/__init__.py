"""Mounts pagedcore in LitServe: the engine in its worker, the OpenAI surface in its API servers.

serve.py       `pagedcore serve --server litserve`, and `run` for a program's own LitServer
api.py         PagedLitAPI: what a LitServer is given
worker.py      the engine, in LitServe's inference worker
front.py       the surface, in LitServe's API servers, before LitServe's own routes
departure.py   how an API server ends
supervisor.py  the main process: signals, workers that die, API servers that end
plan.py        what these processes know of each other
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pagedcore import hookimpl
from pagedcore.config import EngineConfig
from pagedcore.server_config import ServerConfig

if TYPE_CHECKING:
    from pagedcore_litserve.api import PagedLitAPI
    from pagedcore_litserve.serve import run

__all__ = ["PagedLitAPI", "run"]

pagedcore_requires = ">=1,<2"


@hookimpl
def pagedcore_servers() -> Mapping[str, Callable[[EngineConfig, Any], int]]:
    """Offer the mount "litserve"."""
    return {"litserve": _serve}


def _serve(config: EngineConfig, server: ServerConfig) -> int:
    from pagedcore_litserve.serve import serve

    return serve(config, server)


def __getattr__(name: str) -> Any:
    """Import LitServe only for programs that ask for it."""
    if name == "PagedLitAPI":
        from pagedcore_litserve.api import PagedLitAPI

        return PagedLitAPI
    if name == "run":
        from pagedcore_litserve.serve import run

        return run
    raise AttributeError(f"module 'pagedcore_litserve' has no attribute {name!r}")
