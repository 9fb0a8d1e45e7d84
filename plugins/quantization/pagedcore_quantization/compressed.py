"""compressed-tensors: layers in groups, each stored in a way of its own.

G groups of inputs   w = 32 / bits codes in a word

float   weight [out, in] float8, weight_scale: see `stored`
int     weight [out, in] int8, weight_scale [out, G], weight_zero_point [out, G] int8
packed  weight_packed [out, in / w] int32, the code of the first input in the lowest bits;
        weight_scale [out, G], weight_zero_point [out / w, G] int32 or [out, G] int8,
        weight_g_idx [in] int32, weight_shape [2]
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.model import Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import Grouped
from pagedcore.execution.quantizer import LinearMethod, Unquantized, join_rows
from pagedcore_quantization.formats import StoredFormat, check_method
from pagedcore_quantization.fp8 import take_bias
from pagedcore_quantization.gptq import find_order
from pagedcore_quantization.int8 import Int8Linear
from pagedcore_quantization.modules import Modules
from pagedcore_quantization.packed import PackedFormat, SplitLinear
from pagedcore_quantization.packing import (
    Part,
    check_division,
    codes_of,
    dim_of_groups,
    meta_grouped,
    packed_codes,
)
from pagedcore_quantization.schemes import Scheme, Schemes
from pagedcore_quantization.stored import StoredFp8, take_scales


class CompressedTensors(PackedFormat):
    """A `Quantizer` for checkpoints of compressed-tensors."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raises ModelError, naming the field, for settings that are not understood."""
        fields = check_method(name, settings)
        self._schemes = Schemes(fields)
        super().__init__(name, Modules(fields, "ignore"))

    def keeps(self, name: str) -> bool:
        """See `PackedFormat.keeps`."""
        return self._schemes.of(name) is None

    def linear(
        self,
        weights: Weights,
        ops: Ops,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool,
        dim: int | None,
    ) -> LinearMethod:
        """See `Quantizer.linear`."""
        schemes = [self._schemes.of(name) for name in names]
        scheme = schemes[0]
        if any(other != scheme for other in schemes):
            return SplitLinear(
                [
                    self.linear(weights, ops, [name], in_features, [rows], bias=bias, dim=dim)
                    for name, rows in zip(names, out_features, strict=True)
                ]
            )
        if scheme is None:
            take = Unquantized().linear
        elif scheme.kind == "float":
            take = self._floats(scheme).linear
        elif scheme.is_int8:
            take = self._int8
        else:
            take = super().linear
        return take(weights, ops, names, in_features, out_features, bias=bias, dim=dim)

    def part(self, weights: Weights, name: str, rows: int, columns: int, dim: int | None) -> Part:
        """See `PackedFormat.part`."""
        scheme = self._schemes.of(name)
        assert scheme is not None, "those are taken as they are"
        if scheme.kind == "float":
            return self._floats(scheme).take_part(weights, name, rows, columns, dim)
        groups = 1
        if scheme.group is not None:
            check_division(name, "groups", columns, scheme.group)
            groups = columns // scheme.group
        take = _take_int if scheme.kind == "int" else _take_packed
        return take(weights, name, rows, columns, scheme, groups, dim)

    def _floats(self, scheme: Scheme) -> StoredFp8:
        scales: Literal["row", "block"] = "block" if scheme.scales == "block" else "row"
        none = Modules(ConfigFields({}), "ignore")
        return StoredFp8(
            self.name, StoredFormat(scales=scales, suffixes=("weight_scale",), kept=none)
        )

    def _int8(
        self,
        weights: Weights,
        ops: Ops,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool,
        dim: int | None,
    ) -> LinearMethod:
        """A matrix that is multiplied in 8 bits."""
        values, scales = [], []
        for name, rows in zip(names, out_features, strict=True):
            shape = rows, in_features
            values.append(weights.take(f"{name}.weight", shape, dtype=torch.int8, dim=dim))
            scales.append(take_scales(weights, name, rows, 1, dim, own=len(values[-1])))
        added = take_bias(weights, names, out_features, dim=dim) if bias else None
        return Int8Linear(ops, join_rows(values), join_rows(scales), added, weights.dtype)


def _take_int(
    weights: Weights,
    name: str,
    rows: int,
    columns: int,
    scheme: Scheme,
    groups: int,
    dim: int | None,
) -> Grouped:
    values = weights.take(f"{name}.weight", (rows, columns), dtype=torch.int8, dim=dim)
    scale = take_scales(weights, name, rows, groups, dim, own=len(values))
    zero = _take_zeros(weights, name, rows, groups, scale, dim) if scheme.has_zeros else None
    if values.is_meta:
        own = len(values), values.shape[1]
        return meta_grouped(*own, scale.shape[1], 8, zero=zero is not None)
    return Grouped(_unsigned(values), scale, 8, zero=zero)


def _take_packed(
    weights: Weights,
    name: str,
    rows: int,
    columns: int,
    scheme: Scheme,
    groups: int,
    dim: int | None,
) -> Grouped:
    bits, per_word = scheme.bits, 32 // scheme.bits
    check_division(name, "words of inputs", columns, per_word)
    weights.ignore(f"{name}.weight_shape")
    shape = rows, columns // per_word
    words = weights.take(f"{name}.weight_packed", shape, dtype=torch.int32, dim=dim)
    scale = take_scales(weights, name, rows, groups, dim, own=len(words))
    zero: Tensor | None = None
    if scheme.has_zeros and weights.stored_shape(f"{name}.weight_zero_point") == (rows, groups):
        zero = _take_zeros(weights, name, rows, groups, scale, dim)
    elif scheme.has_zeros:
        check_division(name, "words of outputs", rows, per_word)
        stored = weights.take(
            f"{name}.weight_zero_point",
            (rows // per_word, groups),
            dtype=torch.int32,
            dim=dim_of_groups(dim, groups),
        )
        zero = stored if stored.is_meta else codes_of(stored.t(), bits).t().contiguous()
    index: Tensor | None = None
    if scheme.reorders and weights.has(f"{name}.weight_packed"):
        share = 0 if dim == 1 else None
        index = weights.take(f"{name}.weight_g_idx", (columns,), dtype=torch.int32, dim=share)
    if words.is_meta:
        own = len(words), words.shape[1] * per_word
        return meta_grouped(*own, scale.shape[1], bits, zero=zero is not None)
    order = None if index is None else find_order(f"{name}.weight_g_idx", index, groups, columns)
    codes = words.view(torch.uint8)
    if order is not None:
        codes = packed_codes(codes_of(words, bits)[:, order], bits)
    return Grouped(codes, scale, bits, zero=zero, order=order)


def _take_zeros(
    weights: Weights, name: str, rows: int, groups: int, scale: Tensor, dim: int | None
) -> Tensor:
    """Zero points as codes, as many as there are scales: stored are those of signed numbers."""
    shape = weights.stored_shape(f"{name}.weight_zero_point") or (rows, groups)
    if math.prod(shape) == 1:
        zeros = weights.take(f"{name}.weight_zero_point", shape, dtype=torch.int8)
        return zeros if zeros.is_meta else _unsigned(zeros).expand(scale.shape).contiguous()
    zeros = weights.take(
        f"{name}.weight_zero_point",
        (rows, groups),
        dtype=torch.int8,
        dim=dim_of_groups(dim, groups),
    )
    return zeros if zeros.is_meta else _unsigned(zeros)


def _unsigned(values: Tensor) -> Tensor:
    """Signed numbers of 8 bits, plus 128."""
    return values.view(torch.uint8) ^ 128
