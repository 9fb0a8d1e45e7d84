"""GPTQ: codes packed along the inputs, and inputs that may have been put in another order.

G groups of inputs   w = 32 / bits codes in a word

qweight  [in / w, out] int32    the code of the first input in the lowest bits
qzeros   [G, out / w] int32     the code that stands for zero; less one, in the first version
scales   [G, out]
g_idx    [in] int32             the group of each input
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.model import Weights
from pagedcore.execution.quantized import Grouped
from pagedcore_quantization.formats import check_method, read_bits, read_group
from pagedcore_quantization.modules import Modules
from pagedcore_quantization.packed import PackedFormat
from pagedcore_quantization.packing import (
    Part,
    check_division,
    codes_of,
    meta_grouped,
    packed_codes,
    stored_dims,
)


class Gptq(PackedFormat):
    """A `Quantizer` for checkpoints of GPTQ, in both versions of its layout."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raises ModelError, naming the field, for settings that are not understood."""
        fields = check_method(name, settings)
        self._bits = read_bits(fields, "bits")
        self._group = read_group(fields, "group_size")
        self._reorders = fields.flag("desc_act", False)
        form = fields.choice("checkpoint_format", ["gptq", "gptq_v2"], "gptq")
        self._added = 1 if form == "gptq" else 0
        if fields.flag("lm_head", False):
            raise fields.error("lm_head", "must be false: heads are read in 16 bits")
        if fields.values.get("dynamic"):
            raise fields.error("dynamic", "must be empty: all layers alike")
        super().__init__(name, Modules(fields, "modules_to_not_convert"))
        self._chosen = _chosen(fields)

    def keeps(self, name: str) -> bool:
        """See `PackedFormat.keeps`."""
        if self._chosen is not None and not self._chosen.holds(name):
            return True
        return super().keeps(name)

    def part(self, weights: Weights, name: str, rows: int, columns: int, dim: int | None) -> Part:
        """See `PackedFormat.part`."""
        bits, per_word = self._bits, 32 // self._bits
        group = self._group or columns
        check_division(name, "groups", columns, group)
        check_division(name, "words of inputs", columns, per_word)
        check_division(name, "words of outputs", rows, per_word)
        groups = columns // group
        of_words, of_groups = stored_dims(dim, groups)
        words = weights.take(
            f"{name}.qweight", (columns // per_word, rows), dtype=torch.int32, dim=of_words
        )
        zeros = weights.take(
            f"{name}.qzeros", (groups, rows // per_word), dtype=torch.int32, dim=of_groups
        )
        scales = weights.take(f"{name}.scales", (groups, rows), dtype=torch.float32, dim=of_groups)
        index: Tensor | None = None
        if weights.has(f"{name}.g_idx") or (self._reorders and weights.has(f"{name}.qweight")):
            share = 0 if dim == 1 else None
            index = weights.take(f"{name}.g_idx", (columns,), dtype=torch.int32, dim=share)
        if words.is_meta:
            return meta_grouped(
                scales.shape[1], len(words) * per_word, len(scales), bits, zero=True
            )
        zero = (codes_of(zeros, bits) + self._added) & (2**bits - 1)
        packed = words.t().contiguous().view(torch.uint8)
        order = None if index is None else find_order(f"{name}.g_idx", index, groups, columns)
        if order is not None:
            packed = packed_codes(codes_of(words.t(), bits)[:, order], bits)
        return Grouped(
            packed, scales.t().contiguous(), bits, zero=zero.t().contiguous(), order=order
        )


def find_order(name: str, index: Tensor, groups: int, columns: int) -> Tensor | None:
    """The inputs of the first group, then those of the second; None where they stand like that.

    Raises ModelError unless all groups have as many of the `columns`; and where `index` are those
    of one of several ranks, unless they stand in order: in another one, a rank's inputs would
    belong to groups that others have.
    """
    size = columns // groups
    order = index.argsort(stable=True)
    each = torch.arange(groups, dtype=index.dtype, device=index.device).repeat_interleave(size)
    if len(index) < columns:
        each = each[int(index[0]) * size :][: len(index)]
        if torch.equal(index, each):
            return None
        raise ModelError(
            f"{name!r} puts inputs into groups in another order than they stand in (desc_act), and "
            "such a matrix cannot be divided by its inputs: tensor_parallel_size must be 1"
        )
    if not torch.equal(index[order], each):
        raise ModelError(
            f"{name!r} must put {size} inputs into each of {groups} groups by the group_size of "
            "config.json, and it does not. The two do not belong together."
        )
    is_plain = torch.equal(index, each)
    return None if is_plain else order


def _chosen(fields: ConfigFields) -> Modules | None:
    """The layers that are quantized, where a config names those."""
    name = "modules_in_block_to_quantize"
    if not fields.has(name):
        return None
    lists = fields.values[name]
    if type(lists) is not list or not lists:
        raise fields.error(name, "must be a list of layers")
    flat = [item for entry in lists for item in (entry if type(entry) is list else [entry])]
    return Modules(ConfigFields({name: flat}, "quantization_config."), name)
