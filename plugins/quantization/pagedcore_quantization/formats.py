"""What a quantization_config says about weights, checked before any of them is read.

Float8 has two writers beside `compressed`: `fp8` (one scale for a matrix or for each output, or for
blocks of 128 by 128 as DeepSeek and Qwen store them) and `fbgemm_fp8`. What any says about scales
of activations is not needed: these are scaled by the token while running, or not rounded at all,
which loses less than any scale that was measured before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pagedcore.errors import ModelError
from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.quantized import GROUP_COLUMNS
from pagedcore_quantization.modules import Modules

BLOCK = [GROUP_COLUMNS, GROUP_COLUMNS]

METHODS = (
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "fbgemm_fp8",
    "fp8",
    "gguf",
    "gptq",
    "mxfp4",
)
"""Formats that checkpoints may have."""

_FIELD = "quantization_config."


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFormat:
    """How a checkpoint stores its matrices."""

    scales: Literal["row", "block"]
    """One scale for each output, or for a whole part; or one for each block."""

    suffixes: tuple[str, ...]
    """Names that scales may have, behind the matrix's; the first is expected."""

    kept: Modules
    """Layers that were left in 16 bits."""


def check_method(name: str, settings: Mapping[str, Any]) -> ConfigFields:
    """A quantization_config to read. Raises ModelError unless it is one of the format `name`."""
    method = settings.get("quant_method")
    if method == name:
        return ConfigFields(settings, _FIELD)
    if not settings:
        raise ModelError(
            f"the checkpoint is not quantized by its config.json, and {name!r} only reads what is. "
            "Leave out --quantization, or take fp8, which rounds weights while loading."
        )
    raise ModelError(
        f"the checkpoint's weights are stored as {method!r:.40} by its config.json, which "
        f"{name!r} cannot read. Leave out --quantization: the checkpoint's own is taken then. "
        f"Read are {', '.join(METHODS)}."
    )


def read_bits(fields: ConfigFields, name: str) -> int:
    """Bits of a code: 4 or 8."""
    bits = fields.size(name)
    if bits not in (4, 8):
        raise fields.error(name, "must be 4 or 8")
    return bits


def read_group(fields: ConfigFields, name: str) -> int | None:
    """Inputs that share a scale; None is all of them, which is stored as -1."""
    group = fields.size(name, -1, least=-1)
    if group == -1:
        return None
    if group < 16 or group % 16:
        raise fields.error(name, "must be -1, or a multiple of 16")
    return group


def read_format(name: str, settings: Mapping[str, Any]) -> StoredFormat:
    """The format `name` of 8-bit floats by its settings.

    Raises ModelError, naming the field, for what is not understood: guessing would make noise.
    """
    fields = check_method(name, settings)
    if name == "fbgemm_fp8":
        kept = Modules(fields, "modules_to_not_convert")
        return StoredFormat(scales="row", suffixes=("weight_scale",), kept=kept)
    return _read_fp8(fields)


def _read_fp8(fields: ConfigFields) -> StoredFormat:
    fields.choice("fmt", ["e4m3", "float8_e4m3fn"], "e4m3")
    fields.choice("activation_scheme", ["dynamic", "static"], "dynamic")
    kept = Modules(fields, "modules_to_not_convert", "ignored_layers")
    if not fields.has("weight_block_size"):
        names = ("weight_scale", "weight_scale_inv")  # the second is transformers' own
        return StoredFormat(scales="row", suffixes=names, kept=kept)
    check_block(fields, "weight_block_size")
    return StoredFormat(scales="block", suffixes=("weight_scale_inv",), kept=kept)


def check_block(fields: ConfigFields, name: str) -> None:
    """Raise ModelError unless a field says that blocks are those that are read."""
    if fields.values.get(name) != BLOCK:
        raise fields.error(name, f"must be {BLOCK}")
