"""What a quantization_config says about weights of 8 bits, checked before any of them is read.

Three writers are understood: `fp8` (one scale for a matrix or for each output, or for blocks of 128
by 128 as DeepSeek and Qwen store them), `compressed-tensors` in its float formats, and
`fbgemm_fp8`. What they say about activations is not needed: these are scaled by the token while
running, or not rounded at all, which loses less than any scale that was measured before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pagedcore.errors import ModelError
from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.quantized import GROUP_COLUMNS
from pagedcore_quantization.modules import Modules

BLOCK = [GROUP_COLUMNS, GROUP_COLUMNS]

_METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8")
_FIELD = "quantization_config."


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFormat:
    """How a checkpoint stores its matrices."""

    scales: Literal["row", "block"]
    """One scale for each output, or for a whole part; or one for each block."""

    suffix: str
    """The scales' name, behind the matrix's."""

    kept: Modules
    """Layers that were left in 16 bits."""


def read_format(name: str, settings: Mapping[str, Any]) -> StoredFormat:
    """The format `name` by its settings.

    Raises ModelError, naming the field, for what is not understood: guessing would make noise.
    """
    fields = ConfigFields(settings, _FIELD)
    method = settings.get("quant_method")
    if method != name:
        raise ModelError(
            f"the checkpoint's weights are stored as {method!r:.40} by its config.json, which "
            f"{name!r} cannot read. Leave out --quantization: the checkpoint's own is taken then. "
            f"Read are {', '.join(_METHODS)}."
        )
    if name == "fp8":
        return _read_fp8(fields)
    if name == "fbgemm_fp8":
        kept = Modules(fields, "modules_to_not_convert")
        return StoredFormat(scales="row", suffix="weight_scale", kept=kept)
    return _read_compressed_tensors(fields)


def _read_fp8(fields: ConfigFields) -> StoredFormat:
    fields.choice("fmt", ["e4m3", "float8_e4m3fn"], "e4m3")
    fields.choice("activation_scheme", ["dynamic", "static"], "dynamic")
    kept = Modules(fields, "modules_to_not_convert", "ignored_layers")
    if not fields.has("weight_block_size"):
        return StoredFormat(scales="row", suffix="weight_scale", kept=kept)
    _check_block(fields, "weight_block_size")
    return StoredFormat(scales="block", suffix="weight_scale_inv", kept=kept)


def _read_compressed_tensors(fields: ConfigFields) -> StoredFormat:
    fields.choice("format", ["float-quantized", "naive-quantized"], "float-quantized")
    fields.choice("quantization_status", ["compressed", "frozen"], "compressed")
    sparsity = fields.section("sparsity_config")
    if sparsity is not None and sparsity.values:
        sparsity.choice("format", ["dense"], "dense")
    groups = fields.section("config_groups")
    if groups is None or not groups.values:
        raise fields.error("config_groups", "must hold a group of layers")
    found = set()
    for name in groups.values:
        group = groups.section(name)
        if group is None:
            raise groups.error(name, "must be an object")
        if group.values.get("targets") != ["Linear"]:
            raise group.error("targets", "must be ['Linear']: all layers but those of `ignore`")
        found.add(_read_scheme(group))
    if len(found) > 1:
        raise fields.error("config_groups", "must store all layers alike")
    kept = Modules(fields, "ignore")
    return StoredFormat(scales=found.pop(), suffix="weight_scale", kept=kept)


def _read_scheme(group: ConfigFields) -> Literal["row", "block"]:
    scheme = group.section("weights")
    if scheme is None:
        raise group.error("weights", "must say how weights are stored")
    if scheme.size("num_bits") != 8:
        raise scheme.error("num_bits", "must be 8")
    scheme.choice("type", ["float"])
    if not scheme.flag("symmetric", True):
        raise scheme.error("symmetric", "must be true: there is no zero point of floats")
    if scheme.flag("dynamic", False):
        raise scheme.error("dynamic", "must be false: weights do not change")
    if scheme.choice("strategy", ["tensor", "channel", "block"], "tensor") != "block":
        return "row"
    _check_block(scheme, "block_structure")
    return "block"


def _check_block(fields: ConfigFields, name: str) -> None:
    if fields.values.get(name) != BLOCK:
        raise fields.error(name, f"must be {BLOCK}")
