"""Weights of 4 or 8 bits in the layout that `packed_linear` reads.

    N outputs   K inputs   G groups of inputs that share a scale   Q inputs of a quarter
    B blocks of 4 * Q inputs

    words     [N / 16, B, 16, W]    int16, W = Q for 4 bits and 2 * Q for 8; N and K are padded
    scales    [G / 2, N] int32, of two 16-bit scales each, or [G, N] float32, or [G / 4, N] int32,
              of the exponents of four powers of two each
    zeros     [G / 4, N] int32, of four bytes each
    minima    [G, N] float32

Sixteen rows of a block lie together, in one run of 1 or 2 KiB, so whatever part of a weight a
program takes, it reads whole runs.

Word c of a row holds the codes of input c of some of the block's quarters: with 4 bits of all, the
first quarter's in the lowest bits; with 8 bits word c has those of the first and the second, and
word Q + c those of the third and the fourth. So a tile of words becomes tiles of weights without
moving a number between threads, each the factor of a product of its own. A quarter has 16, 32 or
64 inputs; no group ends inside one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.execution.quantized import Grouped
from pagedcore_kernels.packed_codes import FLOAT8, Table
from pagedcore_kernels.packed_plans import best_quarter

ROWS = 16
"""Outputs that lie together."""

POWERS = torch.float8_e8m0fnu
"""The type of scales that are powers of two."""

_PIECE = 2**24
"""Codes that are laid out at a time."""


@dataclass(slots=True)
class Packed(Grouped):
    """A weight whose `codes`, `scale`, `zero` and `minimum` are the tensors above, in that order.

    Its columns are in the original's order, and `order` says as much as there.
    """

    num_outputs: int = 0
    num_inputs: int = 0
    size: int = 0
    """Inputs that share a scale; 0 is all of them."""

    quarter: int = 32
    scale_dtype: torch.dtype = torch.float32
    numbers: tuple[float, ...] | None = None
    """The table, on the host."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.num_outputs, self.num_inputs

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.size or self.num_inputs

    @property
    def kind(self) -> Table:
        """What codes stand for."""
        return FLOAT8 if self.float8 else self.numbers

    @property
    def start(self) -> int:
        """What every code counts from, where each group has no number of its own."""
        return 0 if self.kind or self.minimum is not None else 2 ** (self.bits - 1)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block for each output, with what belongs to its groups."""
        block = 4 * self.quarter
        groups = max(1, block // self.group)
        words = 1 + (self.zero is not None) + (self.minimum is not None)
        return block * self.bits // 8 + 4 * groups * words

    @property
    def num_bytes(self) -> int:
        """What a product reads of it."""
        parts = (self.codes, self.scale, self.zero, self.minimum)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def quarter_of(num_outputs: int, num_inputs: int, group: int) -> int:
    """Inputs of a quarter; 0 where groups have no layout."""
    is_whole = group >= num_inputs
    if num_inputs % 256 == 0 and (is_whole or group % 256 == 0 or group in (64, 128)):
        return best_quarter(num_outputs)
    if is_whole or group % 128 == 0 or group in (32, 64):
        return 32
    return 16 if group == 16 else 0


def pack(weight: Grouped, quarter: int | None = None) -> Packed | None:
    """The same weight in this layout; None where its groups have none."""
    num_outputs, num_inputs = weight.shape
    group = weight.group
    quarter = quarter or quarter_of(num_outputs, num_inputs, group)
    is_whole = group >= num_inputs
    if not quarter or (weight.minimum is not None and (is_whole or group > 4 * quarter)):
        return None
    rows = -(-num_outputs // ROWS) * ROWS
    num_blocks = -(-num_inputs // (4 * quarter))
    num_groups = 1 if is_whole else -(-num_blocks * 4 * quarter // group)

    def padded(values: Tensor) -> Tensor:
        missing = (0, num_groups - values.shape[1], 0, rows - num_outputs)
        if not any(missing):
            return values
        if values.dtype == POWERS:
            return functional.pad(values.view(torch.uint8), missing).view(POWERS)
        return functional.pad(values, missing)

    scale = padded(_scale_of_numbers(weight, is_whole))
    return Packed(
        codes=_pack_codes(weight, quarter),
        scale=_pack_scales(scale),
        bits=weight.bits,
        zero=None if weight.zero is None else _pack_zeros(padded(weight.zero)),
        minimum=None if weight.minimum is None else padded(weight.minimum).t().contiguous(),
        table=weight.table,
        order=weight.order,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        size=0 if is_whole else group,
        quarter=quarter,
        scale_dtype=scale.dtype if scale.dtype in (*_SHORT, POWERS) else torch.float32,
        numbers=None if weight.table is None else tuple(weight.table.tolist()),
        float8=weight.float8,
    )


def unpack(weight: Packed) -> Grouped:
    """A weight as it was before it was packed: what plain torch reads, where no kernel runs."""
    num_outputs, num_inputs = weight.shape
    pairs = weight.codes.view(torch.uint8).unflatten(-1, (-1, weight.quarter, 2))
    if weight.bits == 4:  # [..., 1, Q, 2] bytes of two codes
        quarters = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2).movedim(-1, -2)
    else:
        quarters = pairs.movedim(-1, -2)
    codes = quarters.flatten(3).transpose(1, 2).flatten(2).flatten(0, 1)
    codes = codes[:num_outputs, :num_inputs].contiguous()
    num_groups = 1 if not weight.size else -(-num_inputs // weight.size)

    def restored(words: Tensor, dtype: torch.dtype) -> Tensor:
        values = words.t().contiguous().view(dtype)
        return values[:num_outputs, :num_groups].contiguous()

    return Grouped(
        codes=codes[:, ::2] | codes[:, 1::2] << 4 if weight.bits == 4 else codes,
        scale=restored(weight.scale, weight.scale_dtype),
        bits=weight.bits,
        zero=None if weight.zero is None else restored(weight.zero, torch.uint8),
        minimum=None if weight.minimum is None else restored(weight.minimum, torch.float32),
        table=weight.table,
        order=weight.order,
        float8=weight.float8,
    )


_SHORT = (torch.float16, torch.bfloat16)


def _scale_of_numbers(weight: Grouped, is_whole: bool) -> Tensor:
    """The scale, NaN where a code of its group is that of NaN, which kernels take for a number."""
    scale = weight.scale.float() if is_whole or weight.float8 else weight.scale
    if not weight.float8 or scale.is_meta:
        return scale
    scale = scale.clone()
    step = max(1, _PIECE // weight.shape[1])
    for first in range(0, len(scale), step):
        codes = weight.codes[first : first + step]
        is_nan = (codes & 127 == 127).view(len(codes), scale.shape[1], -1).any(-1)
        scale[first : first + step].masked_fill_(is_nan, torch.nan)
    return scale


def _pack_codes(weight: Grouped, quarter: int) -> Tensor:
    num_outputs, num_inputs = weight.shape
    strips, num_blocks = -(-num_outputs // ROWS), -(-num_inputs // (4 * quarter))
    width = quarter * weight.bits // 4
    words = torch.empty(
        (strips, num_blocks, ROWS, width), dtype=torch.int16, device=weight.codes.device
    )
    if words.is_meta:
        return words
    step = max(1, _PIECE // (ROWS * num_inputs))
    for first in range(0, strips, step):
        codes = weight.codes[first * ROWS : (first + step) * ROWS]
        if weight.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
        padding = (0, num_blocks * 4 * quarter - num_inputs, 0, -len(codes) % ROWS)
        codes = functional.pad(codes, padding)
        blocks = codes.view(-1, ROWS, num_blocks, 4, quarter).transpose(1, 2)
        quarters = blocks.unbind(3)  # each [strips, B, 16, Q]
        if weight.bits == 4:
            pairs = torch.stack([quarters[i] | quarters[i + 1] << 4 for i in (0, 2)], -1)
        else:
            pairs = torch.cat([torch.stack(quarters[i : i + 2], -1) for i in (0, 2)], 3)
        words[first : first + step] = pairs.view(torch.int16).squeeze(-1)
    return words


def _pack_scales(scale: Tensor) -> Tensor:
    """[N, G] as words of two or four, or in float32."""
    if scale.dtype == POWERS:
        return _pack_zeros(scale.view(torch.uint8))
    if scale.dtype not in _SHORT:
        return scale.float().t().contiguous()
    return _words(functional.pad(scale, (0, scale.shape[1] % 2)))


def _pack_zeros(zero: Tensor) -> Tensor:
    """[N, G] uint8 as words of four."""
    return _words(functional.pad(zero, (0, -zero.shape[1] % 4)))


def _words(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32).t().contiguous()
