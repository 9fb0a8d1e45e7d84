"""What bitsandbytes stores: 4 bits that choose from a table, and 8 bits.

n = out * in numbers   b blocks of n / b numbers, row after row

4 bits   weight [n / 2, 1] uint8, the first number in the high half; weight.quant_map [16];
         weight.absmax [b]; weight.quant_state.bitsandbytes__nf4 or __fp4: JSON as bytes.
         Doubly quantized, absmax is uint8: nested_quant_map[absmax] * nested_absmax + offset,
         where 256 share a nested_absmax, and the offset stands in the JSON.
8 bits   weight [out, in] int8, SCB [out]: numbers count SCB / 127 times.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.model import Weights
from pagedcore.execution.quantized import Grouped
from pagedcore_quantization.formats import check_method
from pagedcore_quantization.modules import Modules
from pagedcore_quantization.packed import PackedFormat
from pagedcore_quantization.packing import Part, meta_grouped

BLOCKS = (64, 32, 128, 256, 512, 1024, 2048, 4096)
"""Numbers in a block."""

BLOCK = BLOCKS[0]

NESTED = 256
"""Blocks that share a nested scale."""


class _State(msgspec.Struct):
    """What the JSON beside a weight says."""

    blocksize: int
    shape: list[int]
    nested_blocksize: int = NESTED
    nested_offset: float = 0.0


class BitsAndBytes(PackedFormat):
    """A `Quantizer` for checkpoints of bitsandbytes."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raises ModelError, naming the field, for settings that are not understood."""
        fields = check_method(name, settings)
        in_4, in_8 = (fields.flag(f"load_in_{bits}bit", False) for bits in (4, 8))
        if in_4 == in_8:
            raise fields.error("load_in_4bit", "must be true where load_in_8bit is not, and false")
        self._kind = fields.choice("bnb_4bit_quant_type", ["fp4", "nf4"], "fp4") if in_4 else ""
        self._is_nested = fields.flag("bnb_4bit_use_double_quant", False)
        if in_4:
            fields.choice("bnb_4bit_quant_storage", ["uint8"], "uint8")
        super().__init__(name, Modules(fields, "llm_int8_skip_modules"))

    def keeps(self, name: str) -> bool:
        """See `PackedFormat.keeps`."""
        return name.endswith("lm_head") or super().keeps(name)

    def part(self, weights: Weights, name: str, rows: int, columns: int, dim: int | None) -> Part:
        """See `PackedFormat.part`."""
        if self._kind:
            return self._take_4(weights, f"{name}.weight", rows, columns, dim)
        weights.ignore(f"{name}.weight_format")
        weight = weights.take(f"{name}.weight", (rows, columns), dtype=torch.int8, dim=dim)
        share = 0 if dim == 0 else None
        largest = weights.take(f"{name}.SCB", (rows,), dtype=torch.float32, dim=share)
        if weight.is_meta:
            return meta_grouped(len(weight), weight.shape[1], 1, 8)
        return Grouped(weight.view(torch.uint8) ^ 128, largest[:, None] / 127, 8)

    def _take_4(
        self, weights: Weights, name: str, rows: int, columns: int, dim: int | None
    ) -> Part:
        size = rows * columns
        block, blocks = _blocks(weights, f"{name}.absmax", size)
        num_bytes = -(-size // 2)
        share = None if dim is None else 0
        packed = weights.take(name, (num_bytes, 1), dtype=torch.uint8, dim=share)
        if len(packed) != num_bytes:
            raise ModelError(
                f"{name!r} is stored as one run of blocks of {block} numbers, of which no rank can "
                "have some columns: tensor_parallel_size must be 1 with 4 bits of bitsandbytes"
            )
        table = weights.take(f"{name}.quant_map", (16,), dtype=torch.float32)
        state = self._take_state(weights, name, block, (rows, columns))
        scale = self._take_scale(weights, name, blocks, state)
        is_whole = columns % block == 0
        if packed.is_meta and is_whole:
            return meta_grouped(rows, columns, columns // block, 4, table=True)
        if packed.is_meta:
            return torch.empty((rows, columns), dtype=weights.dtype, device="meta")
        if is_whole:
            codes = (packed << 4 | packed >> 4).view(rows, -1)
            return Grouped(codes, scale.view(rows, -1), 4, table=table)
        codes = torch.cat([packed >> 4, packed & 15], 1).flatten()[:size]
        wide = table[codes.int()] * scale.repeat_interleave(block)[:size]
        return wide.view(rows, columns).to(weights.dtype)  # blocks go on from row to row

    def _take_scale(self, weights: Weights, name: str, blocks: int, state: _State | None) -> Tensor:
        if not self._is_nested:
            return weights.take(f"{name}.absmax", (blocks,), dtype=torch.float32)
        codes = weights.take(f"{name}.absmax", (blocks,), dtype=torch.uint8)
        table = weights.take(f"{name}.nested_quant_map", (256,), dtype=torch.float32)
        shape = (-(-blocks // NESTED),)
        nested = weights.take(f"{name}.nested_absmax", shape, dtype=torch.float32)
        if codes.is_meta:
            return nested
        scale = table[codes.int()] * nested.repeat_interleave(NESTED)[:blocks]
        return scale + (state.nested_offset if state else 0.0)

    def _take_state(
        self, weights: Weights, name: str, block: int, shape: tuple[int, int]
    ) -> _State | None:
        """The JSON beside a weight; None where nothing but shapes, or random numbers, are there."""
        name = f"{name}.quant_state.bitsandbytes__{self._kind}"
        stored = weights.stored_shape(name)
        if stored is None and not self._is_nested:
            return None
        found = weights.take(name, stored or (1,), dtype=torch.uint8)
        if found.is_meta or stored is None:
            return None
        try:
            state = msgspec.json.decode(bytes(found.flatten().tolist()), type=_State)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ModelError(f"{name!r} is not what it should be: {error}.") from error
        expected = _State(block, list(shape), NESTED, state.nested_offset)
        if state != expected or not math.isfinite(state.nested_offset):
            raise ModelError(
                f"{name!r} says {state}, and the tensors beside it {expected}. The two do not "
                "belong together: fetch the model again."
            )
        return state


def _blocks(weights: Weights, name: str, size: int) -> tuple[int, int]:
    """Numbers in a block, and blocks, by the number of scales. Raises ModelError for others."""
    stored = weights.stored_shape(name)
    if stored is None:
        return BLOCK, -(-size // BLOCK)
    for block in BLOCKS:
        if (-(-size // block),) == stored:
            return block, stored[0]
    raise ModelError(
        f"{name!r} has the shape {list(stored)}, which is no scale for each block of {size} "
        f"numbers in blocks of {', '.join(map(str, BLOCKS))}. Fetch the model again."
    )
