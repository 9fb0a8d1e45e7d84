"""The groups of layers in a quantization_config of compressed-tensors, and how each is stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pagedcore.execution.config_fields import ConfigFields
from pagedcore_quantization.formats import check_block, read_bits, read_group
from pagedcore_quantization.modules import Modules

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_MIXED = "mixed-precision"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the layers of one group are stored."""

    kind: Literal["float", "int", "packed"]
    """Numbers of 8 bits, floats or whole; or codes, packed into words."""

    bits: int
    scales: Literal["tensor", "channel", "group", "block"]
    """What has a scale of its own."""

    group: int | None
    """Inputs that share a scale; None is all of them."""

    has_zeros: bool
    reorders: bool
    """Whether inputs were sorted into groups, and the checkpoint says how."""

    rounds_rows: bool
    """Whether activations are rounded to whole numbers of 8 bits too."""

    @property
    def is_int8(self) -> bool:
        """Whether both sides of the product are whole numbers."""
        scaled = self.scales in ("tensor", "channel")
        return self.kind == "int" and self.rounds_rows and scaled and not self.has_zeros


class Schemes:
    """Which scheme a layer has."""

    def __init__(self, fields: ConfigFields) -> None:
        """Raises ModelError, naming the field, for what is not understood."""
        form = fields.choice("format", [*_FORMATS, _MIXED], "float-quantized")
        fields.choice("quantization_status", ["compressed", "frozen"], "compressed")
        for name in ("sparsity_config", "transform_config"):
            section = fields.section(name)
            if section is not None and section.values:
                section.choice("format", ["dense"], None if name[0] == "t" else "dense")
        groups = fields.section("config_groups")
        if groups is None or not groups.values:
            raise fields.error("config_groups", "must hold a group of layers")
        self._kept = Modules(fields, "ignore")
        self._named: list[tuple[Modules, Scheme]] = []
        self._default: Scheme | None = None
        for name in groups.values:
            group = groups.section(name)
            if group is None:
                raise groups.error(name, "must be an object")
            scheme = _read_scheme(
                group, group.choice("format", _FORMATS, form if form != _MIXED else None)
            )
            targets = group.values.get("targets")
            if type(targets) is not list or not targets:
                raise group.error("targets", "must be a list of layers, or ['Linear']")
            if "Linear" not in targets:
                self._named.append((Modules(group, "targets"), scheme))
            elif self._default is None:
                self._default = scheme
            else:
                raise group.error("targets", "must be ['Linear'] in one group only")

    def of(self, name: str) -> Scheme | None:
        """The scheme of the layer `name`; None where it was left in 16 bits."""
        if self._kept.holds(name):
            return None
        for targets, scheme in self._named:
            if targets.holds(name):
                return scheme
        return self._default


def _read_scheme(group: ConfigFields, form: str) -> Scheme:
    fields = group.section("weights")
    if fields is None:
        raise group.error("weights", "must say how weights are stored")
    kind = fields.choice("type", _TYPES[form], "int")
    scales = fields.choice("strategy", _STRATEGIES[kind], "tensor" if kind == "float" else None)
    if fields.flag("dynamic", False):
        raise fields.error("dynamic", "must be false: weights do not change")
    is_packed = form == "pack-quantized"
    bits = read_bits(fields, "num_bits") if is_packed else fields.size("num_bits")
    if not is_packed and bits != 8:
        raise fields.error("num_bits", "must be 8")
    symmetric = fields.flag("symmetric", True)
    if kind == "float" and not symmetric:
        raise fields.error("symmetric", "must be true: there is no zero point of floats")
    if scales == "block":
        check_block(fields, "block_structure")
    group_size = read_group(fields, "group_size") if scales == "group" else None
    if scales == "group" and group_size is None:
        raise fields.error("group_size", "must be the number of inputs that share a scale")
    return Scheme(
        kind="packed" if is_packed else "float" if kind == "float" else "int",
        bits=bits,
        scales=scales,  # type: ignore[arg-type]  # one of the choices
        group=group_size,
        has_zeros=not symmetric,
        reorders=_reorders(fields),
        rounds_rows=_rounds_rows(group),
    )


_TYPES: Mapping[str, list[str]] = {
    "float-quantized": ["float"],
    "int-quantized": ["int"],
    "naive-quantized": ["float", "int"],
    "pack-quantized": ["int"],
}
_STRATEGIES: Mapping[str, list[str]] = {
    "float": ["tensor", "channel", "block"],
    "int": ["tensor", "channel", "group"],
}


def _reorders(fields: ConfigFields) -> bool:
    order: Any = fields.values.get("actorder")
    if order in (None, False):
        return False
    if order is True:
        return True
    return fields.choice("actorder", ["group", "weight", "static", "dynamic"]) in (
        "group",
        "dynamic",
    )


def _rounds_rows(group: ConfigFields) -> bool:
    """Whether activations are rounded to whole numbers of 8 bits."""
    rows = group.section("input_activations")
    if rows is None or not rows.values:
        return False
    if rows.size("num_bits") != 8:
        raise rows.error("num_bits", "must be 8")
    return rows.choice("type", ["int", "float"], "int") == "int"
