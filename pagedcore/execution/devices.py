"""Which device a model runs on, in what type, and how much memory is there for it."""

import os

import torch

from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError
from pagedcore.execution import memory

LEAST_CAPABILITY = (8, 0)
"""Of a GPU: bfloat16 on tensor cores, and asynchronous copies."""

DTYPES = {
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float": torch.float32,
}


def find_device(name: str) -> torch.device:
    """The device that a setting names; raises ConfigError, with a remedy, where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return torch.device("cpu")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise ConfigError(
            f"there is no device {name!r}: torch sees {count} CUDA devices. "
            "Use --device cpu, or check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", int(index) if index else torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        have, least = (".".join(map(str, each)) for each in (capability, LEAST_CAPABILITY))
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has compute capability {have}, and at least "
            f"{least} (A100 and later) is needed: use --device cpu, or another GPU"
        )
    return device


def choose_dtype(asked: str, of_checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that weights and activations get (semantics CFG-1)."""
    if asked != "auto":
        return DTYPES[asked]
    if of_checkpoint != torch.float32:
        return of_checkpoint
    has_bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def total_bytes(device: torch.device) -> int:
    """Memory of a GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def available_bytes(config: EngineConfig, device: torch.device) -> int:
    """Bytes for weights, activations and cache together (MEM-1, MEM-7)."""
    if device.type != "cuda":
        return _host_bytes()
    free, total = torch.cuda.mem_get_info(device)
    if config.cache.kv_cache_memory_bytes is not None:
        return free
    return memory.requested_bytes(total, free, config.cache.gpu_memory_utilization)


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
