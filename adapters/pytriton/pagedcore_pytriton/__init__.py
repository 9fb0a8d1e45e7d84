"""Mounts pagedcore in NVIDIA Triton, through PyTriton.

mount.py         `pagedcore serve --server pytriton`: the processes, their start and their end
model.py         a model in a Triton, also in that of a program's own: bind_paged_model
completions.py   what a request of Triton's asks for, and the answer
tensors.py       inputs and outputs, as Triton declares them
cancellation.py  learns from Triton's side that a client has gone
metrics.py       puts our metrics on Triton's port
sidecar.py       the OpenAI surface beside Triton
tritonserver.py  tritonserver, as this mount needs it
environment.py   what it needs of the machine, and what one that was killed has left
shim.py          ships stub_model.py to Triton
stub_model.py    runs in Triton's Python backend, not here
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pagedcore import hookimpl
from pagedcore.config import EngineConfig
from pagedcore.server_config import ServerConfig

if TYPE_CHECKING:
    from pagedcore_pytriton.environment import prepare_environment
    from pagedcore_pytriton.model import bind_paged_model

__all__ = ["bind_paged_model", "prepare_environment"]

pagedcore_requires = ">=1,<2"


def _serve(config: EngineConfig, server: ServerConfig) -> int:
    from pagedcore_pytriton.mount import serve

    return serve(config, server)


@hookimpl
def pagedcore_servers() -> Mapping[str, Callable[[EngineConfig, Any], int]]:
    """Offer the mount "pytriton"."""
    return {"pytriton": _serve}


def __getattr__(name: str) -> Any:
    """Import what needs PyTriton only for programs that ask for it."""
    if name == "bind_paged_model":
        from pagedcore_pytriton.model import bind_paged_model

        return bind_paged_model
    if name == "prepare_environment":
        from pagedcore_pytriton.environment import prepare_environment

        return prepare_environment
    raise AttributeError(f"module 'pagedcore_pytriton' has no attribute {name!r}")
