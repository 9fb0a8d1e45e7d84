"""Weights of 4 and 8 bits on the CPU: packed into panels of codes, as `grouped.c` reads them.

    P panels of 32 outputs   G groups of inputs

A weight that the kernel was not made for, by its sizes or for other rows than bfloat16, is
multiplied in plain torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedcore.errors import ConfigError
from pagedcore.execution.native.library import Library, load_library
from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_ops import TorchOps

PANEL = 32
"""Outputs of a weight that lie together."""

_ARENA = 1 << 25
"""Elements of an arena: weights in bfloat16 lie in few large pieces."""

_FEW = 12
"""Rows for which codes are widened in registers; for more, panels are widened once for all."""

_FEWER = 8
"""The same, where a copy in bfloat16 is at hand: more rows take that."""

COPIES = 1 << 30
"""Bytes of copies in bfloat16 at most: small models keep one of each weight beside its codes. Many
rows are bound by arithmetic, and codes would cost them a twentieth."""


@dataclass(slots=True, kw_only=True)
class _Panels(Grouped):
    """A weight in panels: codes are words [P, in * bits / 32, 32] int32.

    `scale` and `minimum` are [P, G, 32], both float16 or both float32; `table` is [32] bfloat16.
    """

    outputs: int
    inputs: int
    copy: Tensor | None = None
    """In bfloat16, as `pack_linear` leaves it."""

    @property
    def shape(self) -> tuple[int, int]:
        """See `Grouped.shape`."""
        return self.outputs, self.inputs


class GroupedOps(TorchOps):
    """The part of `NativeOps` that multiplies with `Grouped` weights."""

    def __init__(self, device: str) -> None:
        """Raises ConfigError, saying why, where the kernels cannot run."""
        super().__init__(device)
        if self._device.type != "cpu":
            raise ConfigError(f"backend native runs on a CPU, not on {device!r}")
        self._library: Library = load_library()
        self._arena = torch.empty(0, dtype=torch.bfloat16)
        self._sums = torch.empty(0)
        self._left_for_copies = COPIES

    def pack_grouped(self, weight: Grouped, dtype: torch.dtype) -> Grouped:
        """See `QuantizedOps.pack_grouped`."""
        per_word = 32 // weight.bits
        if dtype != torch.bfloat16 or weight.group % per_word or weight.float8:
            return super().pack_grouped(weight, dtype)
        outputs, inputs = weight.shape
        scale, minimum = weight.scale.float(), _minimum(weight)
        kept = torch.float32
        if _is_half(scale) and (minimum is None or _is_half(minimum)):
            kept = torch.float16
        panels = -(-outputs // PANEL)
        codes = torch.empty(panels, inputs // per_word, PANEL, dtype=torch.int32)
        words = weight.codes.view(torch.int32)
        self._library.pack_codes(
            words.data_ptr(), outputs, words.shape[1], weight.bits, codes.data_ptr()
        )
        packed = _Panels(
            codes=codes,
            scale=_panels(scale.to(kept)),
            bits=weight.bits,
            minimum=None if minimum is None else _panels(minimum.to(kept)),
            table=_table(weight).bfloat16().repeat(2),
            order=weight.order,
            outputs=outputs,
            inputs=inputs,
        )
        if 2 * outputs * inputs <= self._left_for_copies:
            self._left_for_copies -= 2 * outputs * inputs
            packed.copy = self._widen(packed)
        return packed

    def _widen(self, weight: _Panels) -> Tensor:
        """The weight in bfloat16, as `pack_linear` leaves one."""
        assert weight.table is not None
        copy = self.take_room(weight.outputs, weight.inputs)
        self._library.widen(
            weight.inputs,
            weight.codes.data_ptr(),
            weight.bits,
            weight.table.data_ptr(),
            weight.scale.data_ptr(),
            None if weight.minimum is None else weight.minimum.data_ptr(),
            weight.scale.dtype == torch.float16,
            weight.scale.shape[1],
            weight.outputs,
            copy.data_ptr(),
        )
        return copy

    def take_room(self, outputs: int, inputs: int) -> Tensor:
        """Memory for a weight [out, in] in panels of bfloat16."""
        size = -(-outputs // PANEL) * PANEL * inputs
        if size > len(self._arena):
            self._arena = torch.empty(max(size, _ARENA), dtype=torch.bfloat16)
        room, self._arena = self._arena[:size], self._arena[size:]
        return room[: outputs * inputs].view(outputs, inputs)

    def grouped_linear(self, x: Tensor, weight: Grouped, bias: Tensor | None = None) -> Tensor:
        """See `QuantizedOps.grouped_linear`."""
        if not isinstance(weight, _Panels):
            return super().grouped_linear(x, weight, bias)
        x = x.contiguous() if weight.order is None else x.index_select(1, weight.order)
        assert x.dtype == torch.bfloat16
        assert bias is None or bias.dtype == torch.bfloat16
        rows, groups = x.shape[0], weight.scale.shape[1]
        if rows > _FEWER and weight.copy is not None:
            return self.linear(x, weight.copy, bias)
        if weight.minimum is not None and _FEW * groups > len(self._sums):
            self._sums = torch.empty(_FEW * groups)
        assert weight.table is not None
        out = x.new_empty(rows, weight.outputs)
        failed = self._library.grouped(
            x.data_ptr(),
            rows,
            weight.inputs,
            weight.codes.data_ptr(),
            weight.bits,
            weight.table.data_ptr(),
            weight.scale.data_ptr(),
            None if weight.minimum is None else weight.minimum.data_ptr(),
            weight.scale.dtype == torch.float16,
            groups,
            self._sums.data_ptr(),
            weight.outputs,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            _FEW,
        )
        if failed:
            raise MemoryError("no memory for a panel of a weight")
        return out


def _minimum(weight: Grouped) -> Tensor | None:
    """What is added to each code times its scale, where codes count as `_table` says."""
    middle = 2 ** (weight.bits - 1)
    scale = weight.scale.float()
    if weight.minimum is not None:
        return weight.minimum if weight.bits == 4 else weight.minimum + middle * scale
    return None if weight.zero is None else (middle - weight.zero.float()) * scale


def _table(weight: Grouped) -> Tensor:
    """What codes of 4 bits count [16]; those of 8 bits are signed in the kernel."""
    if weight.table is not None:
        return weight.table
    codes = torch.arange(16.0)
    return codes if weight.minimum is not None else codes - 8


def _panels(rows: Tensor) -> Tensor:
    """[out, n] as [P, n, 32], zeros behind the last output."""
    padded = rows.new_zeros((-(-len(rows) // PANEL) * PANEL, rows.shape[1]))
    padded[: len(rows)] = rows
    return padded.view(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()


def _is_half(values: Tensor) -> bool:
    """Whether float16 holds them without an error."""
    return torch.equal(values.half().float(), values)
