"""Mounts pagedcore in NVIDIA Triton, through PyTriton.

mount.py         `pagedcore serve --server pytriton`: the processes, their start and their end
tritonserver.py  tritonserver with one model, as this mount needs it
completions.py   what a request of Triton's asks for, and the answer
tensors.py       inputs and outputs, as Triton declares them
cancellation.py  learns from Triton's side that a client has gone
stub_model.py    runs in Triton's Python backend, not here
"""

from collections.abc import Callable, Mapping
from typing import Any

from pagedcore import hookimpl
from pagedcore.config import EngineConfig
from pagedcore.server_config import ServerConfig

pagedcore_requires = ">=1,<2"


def _serve(config: EngineConfig, server: ServerConfig) -> int:
    from pagedcore_pytriton.mount import serve

    return serve(config, server)


@hookimpl
def pagedcore_servers() -> Mapping[str, Callable[[EngineConfig, Any], int]]:
    """Offer the mount "pytriton"."""
    return {"pytriton": _serve}
