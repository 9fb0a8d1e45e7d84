"""What the core itself offers, through the same door as anyone's plugin."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from pagedcore._markers import hookimpl

if TYPE_CHECKING:
    import torch

    from pagedcore.execution.kv_formats import KVFormat
    from pagedcore.execution.ops import Ops
    from pagedcore.scheduling.policies import Policy
    from pagedcore.sources import Source


@hookimpl
def pagedcore_backends() -> Mapping[str, Callable[[str], "Ops"]]:
    """Plain torch, on any device; and C, on a CPU with arithmetic in bfloat16."""
    return {"torch": _torch_ops, "native": _native_ops}


@hookimpl
def pagedcore_kv_formats() -> Mapping[str, Callable[["torch.dtype"], "KVFormat"]]:
    """The model's own type, 8 bits that float, and 8 bits with a scale for each vector."""
    return {
        "auto": _own_type,
        "fp8": partial(_fp8, "fp8"),
        "fp8_e4m3": partial(_fp8, "fp8_e4m3"),
        "int8": _int8,
    }


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


def _own_type(dtype: "torch.dtype") -> "KVFormat":
    from pagedcore.execution.kv_formats import as_is

    return as_is(dtype)


def _fp8(name: str, _: "torch.dtype") -> "KVFormat":
    from pagedcore.execution.kv_formats import fp8

    return fp8(name)


def _int8(_: "torch.dtype") -> "KVFormat":
    from pagedcore.execution.kv_formats import Int8

    return Int8()
