"""What a deployer may tune about adapters (LoRA); a section of `pagedcore.config`."""

import re
from dataclasses import dataclass

from pagedcore.checked_types import check_types
from pagedcore.errors import ConfigError

MAX_RANK = 512
MAX_SLOTS = 1024
MAX_NAME = 255
"""Characters of an adapter's name."""

_NAME = re.compile(r"[^\s\x00-\x1f](?:[^\x00-\x1f]{0,253}[^\s\x00-\x1f])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of one model, chosen by their names."""

    enable_lora: bool = False
    """Make room for adapters (LoRA), which requests choose by name (LORA-1)."""

    max_loras: int = 1
    """Most adapters that run at the same time; requests for others wait."""

    max_lora_rank: int = 16
    """Largest rank of an adapter; memory is taken for it, for `max_loras` adapters."""

    max_cpu_loras: int | None = None
    """Most adapters that are loaded, in the host's memory; by default `max_loras`."""

    lora_modules: tuple[str, ...] = ()
    """Adapters to load at the start, each as name=folder."""

    lora_root: str | None = None
    """Folder below which adapters may be loaded over the API; by default nothing may (LORA-2)."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, most in (("max_loras", MAX_SLOTS), ("max_lora_rank", MAX_RANK)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must be in 1..{most}, not {getattr(self, name)}")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ConfigError(
                f"max_cpu_loras must be at least max_loras ({self.max_loras}), "
                f"not {self.max_cpu_loras}"
            )
        if not self.enable_lora and (self.lora_modules or self.lora_root is not None):
            raise ConfigError("lora_modules and lora_root need enable_lora")
        names = [name for name, _ in self.modules]
        if len(set(names)) < len(names):
            raise ConfigError("lora_modules names an adapter twice")

    @property
    def capacity(self) -> int:
        """Most adapters that are loaded."""
        return self.max_cpu_loras or self.max_loras

    @property
    def modules(self) -> list[tuple[str, str]]:
        """Name and folder of each adapter to load at the start."""
        pairs = []
        for item in self.lora_modules:
            name, equals, folder = item.partition("=")
            if not equals or not folder:
                raise ConfigError(f"lora_modules must hold name=folder, not {item!r:.200}")
            pairs.append((check_adapter_name(name), folder))
        return pairs


def check_adapter_name(name: str) -> str:
    """The name, if an adapter can be called that; raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "an adapter's name must be 1..255 characters without control characters and outer "
            f"spaces, not {name!r:.80}"
        )
    return name
