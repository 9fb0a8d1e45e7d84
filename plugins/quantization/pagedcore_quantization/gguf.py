"""Blocks of GGUF files, kept as they are: `packed:` in front of a model's name converts it so.

    weight [out, bytes of a row] uint8, in one of ggml's types, which config.json names

The layouts are told in `pagedcore.sources.gguf_quants`. What a type multiplies after another is
multiplied while loading, so that each run of 16 or 32 numbers has one scale and one minimum:

    Q4_0 Q8_0   (c - 8 or 128) * d                  float16 scales
    Q4_1        c * d + m                           float16 scales, minima
    Q4_K Q5_K   c * (d * scale) - (m * minimum)     float32 scales, minima
    Q6_K        (c - 128) * (d * scale)             float32 scales
    Q5_0 Q5_1   as Q8_0 and Q4_1, in 8 bits

All of them are products and sums that float32 rounds as llama.cpp's own do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.model import Weights
from pagedcore.execution.quantized import Grouped
from pagedcore_quantization.formats import check_method
from pagedcore_quantization.modules import Modules
from pagedcore_quantization.packed import PackedFormat
from pagedcore_quantization.packing import check_division, meta_grouped


class Gguf(PackedFormat):
    """A `Quantizer` for folders that were made of a GGUF file, with its blocks."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raises ModelError, naming the field, for settings that are not understood."""
        fields = check_method(name, settings)
        types = fields.section("types")
        if types is None:
            raise fields.error("types", "must say in which type each layer is stored")
        self._types = {layer: _TYPES[types.choice(layer, list(_TYPES))] for layer in types.values}
        super().__init__(name, Modules(fields, "modules_to_not_convert"))

    def keeps(self, name: str) -> bool:
        """See `PackedFormat.keeps`."""
        return name not in self._types

    def head(self, weights: Weights, name: str, vocab_size: int, h: int) -> Grouped | None:
        """See `HeadQuantizer.head`."""
        return None if self.keeps(name) else self.part(weights, name, vocab_size, h, 0)

    def part(
        self, weights: Weights, name: str, rows: int, columns: int, dim: int | None
    ) -> Grouped:
        """See `PackedFormat.part`."""
        kind = self._types[name]
        check_division(name, "blocks", columns, kind.size)
        blocks = columns // kind.size
        stored = weights.take(
            f"{name}.weight", (rows, blocks * kind.num_bytes), dtype=torch.uint8, dim=dim
        )
        own_rows, own_bytes = stored.shape
        own_columns, left = divmod(own_bytes * kind.size, kind.num_bytes)
        if left or own_columns % kind.size:
            raise ModelError(
                f"{name!r} holds its {columns} inputs in blocks of {kind.size}, and a rank would "
                "get only a part of one: tensor_parallel_size must be smaller"
            )
        if stored.is_meta:
            groups = own_columns // kind.group
            return meta_grouped(own_rows, own_columns, groups, kind.bits, minimum=kind.has_minimum)
        codes, scale, minimum = kind.unpack(stored.view(-1, kind.num_bytes))
        return Grouped(
            codes.reshape(own_rows, -1),
            scale.reshape(own_rows, -1),
            kind.bits,
            minimum=None if minimum is None else minimum.reshape(own_rows, -1),
        )


Unpacked = tuple[Tensor, Tensor, Tensor | None]
"""Of n blocks: codes [n, ...] as in `Grouped`, scales and perhaps minima [n, groups] float32."""


@dataclass(frozen=True, slots=True)
class _Type:
    """How one of ggml's types stores numbers."""

    size: int
    """Numbers in a block."""

    num_bytes: int
    """Bytes of a block."""

    bits: int
    """Of a code, once it is unpacked."""

    group: int
    """Numbers that share a scale."""

    has_minimum: bool
    unpack: Callable[[Tensor], Unpacked]
    """From blocks [n, num_bytes]."""


def _float16(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block: [n, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _low_then_high(packed: Tensor) -> Tensor:
    """Bytes [..., w] as [..., 2 * w]: all low halves, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _bits(packed: Tensor) -> Tensor:
    """Bits of bytes [n, w], the lowest first: [n, 8 * w]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, :, None] >> shifts & 1).flatten(1)


def _beside(packed: Tensor) -> Tensor:
    """Bytes [..., w], as `_low_then_high` reads them, as many with neighbours in one byte."""
    pairs = packed.contiguous().view(torch.int16)
    low = pairs & 15 | pairs >> 4 & 240
    high = pairs >> 4 & 15 | pairs >> 8 & 240
    return torch.cat([low.to(torch.uint8), high.to(torch.uint8)], -1)


def _q4_0(blocks: Tensor) -> Unpacked:
    return _beside(blocks[:, 2:]), _float16(blocks, 0), None


def _q4_1(blocks: Tensor) -> Unpacked:
    return _beside(blocks[:, 4:]), _float16(blocks, 0), _float16(blocks, 2)


def _q5_0(blocks: Tensor) -> Unpacked:
    codes = _low_then_high(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return codes + 112, _float16(blocks, 0), None  # the zero of 8 bits is 128, not 16


def _q5_1(blocks: Tensor) -> Unpacked:
    codes = _low_then_high(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return codes, _float16(blocks, 0), _float16(blocks, 2)


def _q8_0(blocks: Tensor) -> Unpacked:
    return blocks[:, 2:] ^ 128, _float16(blocks, 0), None


def _q4_k(blocks: Tensor) -> Unpacked:
    codes = _beside(blocks[:, 16:].reshape(-1, 4, 32)).flatten(1)
    return codes, *_scales_k(blocks)


def _q5_k(blocks: Tensor) -> Unpacked:
    low = _low_then_high(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    high = blocks[:, None, 16:48] >> shifts & 1  # bit s of byte i is that of value i in run s
    return (low | high << 4).flatten(1), *_scales_k(blocks)


def _scales_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits, in 12 bytes; see `gguf_quants`."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], -1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1)
    return _float16(blocks, 0) * scales, -(_float16(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Unpacked:
    low = _low_then_high(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    codes = (low | high << 4).flatten(1) + 96  # the zero of 8 bits is 128, not 32
    return codes, _float16(blocks, 208) * blocks[:, 192:208].view(torch.int8), None


_TYPES: Mapping[str, _Type] = {
    "Q4_0": _Type(32, 18, 4, 32, False, _q4_0),
    "Q4_1": _Type(32, 20, 4, 32, True, _q4_1),
    "Q5_0": _Type(32, 22, 8, 32, False, _q5_0),
    "Q5_1": _Type(32, 24, 8, 32, True, _q5_1),
    "Q8_0": _Type(32, 34, 8, 32, False, _q8_0),
    "Q4_K": _Type(256, 144, 4, 32, True, _q4_k),
    "Q5_K": _Type(256, 176, 8, 32, True, _q5_k),
    "Q6_K": _Type(256, 210, 8, 16, False, _q6_k),
}
