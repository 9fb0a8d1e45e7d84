"""Defaults for a purpose: what `--preset` sets, declared once.

A preset stands between the deployer and the device: a setting that is given wins over the preset,
and the preset over the default that depends on the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

PresetName = Literal["general", "low-latency", "high-throughput"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Values of settings, by their names; None leaves a setting to the device's default."""

    about: str
    """For whom it is, and what it gives up."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    long_prefill_token_threshold: int | None = None
    kv_watermark: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What it sets, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["about"]
        return {name: value for name, value in values.items() if value is not None}


PRESETS: Mapping[PresetName, Preset] = MappingProxyType(
    {
        "general": Preset(about="The device's own defaults."),
        "low-latency": Preset(
            about=(
                "Steps stay short, so that tokens follow each other evenly: few sequences, long "
                "prompts in small parts, and blocks left free, so that nobody is preempted. The "
                "rest waits in the queue, and tokens per second are fewer."
            ),
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            long_prefill_token_threshold=512,
            kv_watermark=0.02,
        ),
        "high-throughput": Preset(
            about=(
                "Steps are as large as they pay: most tokens per second, for batches that nobody "
                "watches. A token may wait for another request's long prompt."
            ),
            max_num_seqs=1024,
            max_num_batched_tokens=16384,
        ),
    }
)
"""By the name that `--preset` takes."""
