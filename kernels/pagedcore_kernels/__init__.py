"""Triton kernels, and the backend "triton" made of them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pagedcore import hookimpl

if TYPE_CHECKING:
    from pagedcore.execution.ops import Ops

pagedcore_requires = ">=1,<2"


@hookimpl
def pagedcore_backends() -> Mapping[str, Callable[[str], "Ops"]]:
    """Kernels for NVIDIA GPUs of compute capability 8.0 and later."""
    return {"triton": _triton_ops}


def _triton_ops(device: str) -> "Ops":
    from pagedcore_kernels.backend import TritonOps

    return TritonOps(device)
