"""What the core itself offers, through the same door as anyone's plugin."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pagedcore._markers import hookimpl

if TYPE_CHECKING:
    from pagedcore.execution.ops import Ops
    from pagedcore.scheduling.policies import Policy
    from pagedcore.sources import Source


@hookimpl
def pagedcore_backends() -> Mapping[str, Callable[[str], "Ops"]]:
    """Plain torch, on any device; and C, on a CPU with arithmetic in bfloat16."""
    return {"torch": _torch_ops, "native": _native_ops}


@hookimpl
def pagedcore_policies() -> Mapping[str, Callable[[], "Policy"]]:
    """First come, first served; by priority; and in fair shares."""
    from pagedcore.scheduling.fairness import FairShare
    from pagedcore.scheduling.policies import FirstComeFirstServed, Priority

    return {"fcfs": FirstComeFirstServed, "priority": Priority, "fair": FairShare}


@hookimpl
def pagedcore_sources() -> Mapping[str, Callable[[], "Source"]]:
    """Hubs, wheels of the package index, and GGUF files."""
    from pagedcore.sources import builtin_sources

    return builtin_sources()


def _torch_ops(device: str) -> "Ops":
    from pagedcore.execution.torch_ops import TorchOps

    return TorchOps(device)


def _native_ops(device: str) -> "Ops":
    from pagedcore.execution.native.ops import NativeOps

    return NativeOps(device)
