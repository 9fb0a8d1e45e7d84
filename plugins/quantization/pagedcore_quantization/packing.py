"""Codes of few bits in the words that formats store them in, and as `Grouped` has them.

    n columns   w = n * bits / 32 words

A word of 32 bits holds 4 or 8 codes. On the device "meta" nothing but shapes is looked at.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_quantized import widen_grouped

Part = Grouped | Tensor
"""A part of a matrix: packed, or [rows, columns] in the model's type where it cannot be."""


def check_division(name: str, what: str, size: int, divisor: int) -> None:
    """Raise ModelError unless the sizes of the layer `name` fit what its config says."""
    if size % divisor:
        raise ModelError(
            f"config.json: quantization_config wants {what} of {divisor}, and {name!r} has {size} "
            "of them, which is no multiple. The two do not belong together."
        )


def dim_of_groups(dim: int | None, groups: int) -> int | None:
    """What is divided of scales [rows, groups]: not the single one that all inputs share."""
    return None if dim == 1 and groups == 1 else dim


def stored_dims(dim: int | None, groups: int) -> tuple[int | None, int | None]:
    """The same of codes [columns, rows] and scales [groups, rows], which stand on their side."""
    codes, scales = dim, dim_of_groups(dim, groups)
    return None if codes is None else 1 - codes, None if scales is None else 1 - scales


def codes_of(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, w], the first code in the lowest bits, as uint8 [rows, n]."""
    codes = words.contiguous().view(torch.uint8)
    return codes if bits == 8 else halves(codes)


def halves(packed: Tensor) -> Tensor:
    """Bytes [rows, n / 2] as [rows, n]: each one's low half, then its high half."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] as `Grouped.codes`."""
    if bits == 8:
        return codes.contiguous()
    return (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()


def meta_grouped(
    rows: int,
    columns: int,
    groups: int,
    bits: int,
    *,
    zero: bool = False,
    minimum: bool = False,
    table: bool = False,
) -> Grouped:
    """A weight without content, to see its size."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return Grouped(
        codes=empty(rows, columns * bits // 8, dtype=torch.uint8),
        scale=empty(rows, groups, dtype=torch.float16),
        bits=bits,
        zero=empty(rows, groups, dtype=torch.uint8) if zero else None,
        minimum=empty(rows, groups, dtype=torch.float32) if minimum else None,
        table=empty(16, dtype=torch.float32) if table else None,
    )


def widen_part(weight: Grouped, dtype: torch.dtype) -> Tensor:
    """What a part stands for, its columns in the order of the inputs: [out, in] in `dtype`."""
    if weight.codes.is_meta:
        return torch.empty(weight.shape, dtype=dtype, device="meta")
    wide = widen_grouped(weight, dtype)
    return wide if weight.order is None else wide[:, weight.order.argsort()]


def plainest(weight: Grouped) -> Grouped:
    """The same weight in less memory: scales in 16 bits, and no zeros, where that changes nothing.

    A weight without zeros has those of a symmetric one.
    """
    zero = weight.zero
    if weight.scale.dtype.itemsize == 1:
        return weight
    if zero is not None and bool((zero == 2 ** (weight.bits - 1)).all()):
        zero = None
    for dtype in (torch.float16, torch.bfloat16):
        scale = weight.scale.to(dtype)
        if torch.equal(scale.float(), weight.scale):
            return replace(weight, zero=zero, scale=scale)
    return replace(weight, zero=zero)
