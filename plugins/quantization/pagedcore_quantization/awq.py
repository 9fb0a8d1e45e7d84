"""AWQ: codes packed along the outputs, eight in a word, in an order of their own.

G groups of inputs

qweight  [in, out / 8] int32    output 8 j + ORDER[k] in the k-th four bits of word j
qzeros   [G, out / 8] int32     the same, of the codes that stand for zero
scales   [G, out]
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pagedcore.execution.model import Weights
from pagedcore.execution.quantized import Grouped
from pagedcore_quantization.formats import check_method, read_group
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

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = [ORDER.index(output) for output in range(8)]


class Awq(PackedFormat):
    """A `Quantizer` for checkpoints of AWQ in the layout `gemm`."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raises ModelError, naming the field, for settings that are not understood."""
        fields = check_method(name, settings)
        bits = "bits" if fields.has("bits") else "w_bit"
        if fields.size(bits) != 4:
            raise fields.error(bits, "must be 4")
        self._group = read_group(
            fields, "group_size" if fields.has("group_size") else "q_group_size"
        )
        version = fields.values.get("version")
        if not (version is None or (isinstance(version, str) and version.lower() == "gemm")):
            raise fields.error("version", "must be gemm")
        fields.choice("backend", ["autoawq"], "autoawq")
        if not fields.flag("zero_point", True):
            raise fields.error("zero_point", "must be true: the layout has zeros")
        super().__init__(name, Modules(fields, "modules_to_not_convert"))

    def part(self, weights: Weights, name: str, rows: int, columns: int, dim: int | None) -> Part:
        """See `PackedFormat.part`."""
        group = self._group or columns
        check_division(name, "groups", columns, group)
        check_division(name, "words of outputs", rows, 8)
        groups = columns // group
        of_words, of_groups = stored_dims(dim, groups)
        words = weights.take(
            f"{name}.qweight", (columns, rows // 8), dtype=torch.int32, dim=of_words
        )
        zeros = weights.take(
            f"{name}.qzeros", (groups, rows // 8), dtype=torch.int32, dim=of_groups
        )
        scales = weights.take(f"{name}.scales", (groups, rows), dtype=torch.float32, dim=of_groups)
        if words.is_meta:
            return meta_grouped(scales.shape[1], len(words), len(scales), 4, zero=True)
        return Grouped(
            packed_codes(_by_output(words), 4),
            scales.t().contiguous(),
            4,
            zero=_by_output(zeros).contiguous(),
        )


def _by_output(words: Tensor) -> Tensor:
    """int32 [n, out / 8] as codes [out, n]."""
    codes = codes_of(words, 4)
    return codes.view(len(words), -1, 8)[:, :, _PLACES].flatten(1).t()
