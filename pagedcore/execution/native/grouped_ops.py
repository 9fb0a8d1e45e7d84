"""Weights of 4 and 8 bits on the CPU: packed into panels of codes, as the kernels read them.

    P panels of 32 outputs   G groups of inputs

A weight that the kernel was not made for, by its sizes or for other rows than bfloat16, is
multiplied in plain torch.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pagedcore.errors import ConfigError
from pagedcore.execution.expert_ops import Experts, Matrices
from pagedcore.execution.native.library import Library, load_library
from pagedcore.execution.quantized import Grouped, rows_of
from pagedcore.execution.torch_ops import TorchOps

PANEL = 32
"""Outputs of a weight that lie together."""

_ARENA = 1 << 26
"""Bytes of a piece of an arena."""

_LINE = 64
"""Bytes of a line of the cache."""

_LONGEST = 256
"""Inputs of a group at most, of which 16 bits times 8 are summed in 32 bits."""

_FEW = 16
"""Rows that are multiplied with codes as they are; for more, panels are widened once for all."""

_FEWER = 8
"""The same, where a copy in bfloat16 is at hand: more rows take that."""

COPIES = 1 << 30
"""Bytes of copies in bfloat16 at most: small models keep one of each weight beside its codes. Many
rows are bound by arithmetic, and codes would cost them a twentieth."""


class Arena:
    """Memory for weights that are read one after the other, in few large pieces."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """So many bytes."""
        if size > len(self._left):
            self._left = torch.empty(max(size, _ARENA), dtype=torch.uint8)
        room, self._left = self._left[:size], self._left[-(-size // _LINE) * _LINE :]
        return room

    def take_panels(self, outputs: int, inputs: int) -> Tensor:
        """A weight [out, in] in panels of bfloat16, with room for its last panel."""
        room = self.take(-(-outputs // PANEL) * PANEL * inputs * 2).view(torch.bfloat16)
        return room[: outputs * inputs].view(outputs, inputs)


@dataclass(slots=True, kw_only=True)
class _Panels(Grouped):
    """A weight in panels: codes are words [P, in * bits / 32, 32] int32.

    `scale` and `minimum` are [P, G, 32], both float16 or both float32; `table` is [32] bfloat16.
    """

    middle: int
    """What a code counts from; -1 where only the table knows what it stands for."""

    outputs: int
    inputs: int
    copy: Tensor | None = None
    """In bfloat16, as `pack_linear` leaves it."""

    @property
    def shape(self) -> tuple[int, int]:
        """See `Grouped.shape`."""
        return self.outputs, self.inputs


class GroupedOps(TorchOps):
    """The part of `NativeOps` that multiplies with weights of few bits."""

    def __init__(self, device: str) -> None:
        """Raises ConfigError, saying why, where the kernels cannot run."""
        super().__init__(device)
        if self._device.type != "cpu":
            raise ConfigError(f"backend native runs on a CPU, not on {device!r}")
        self._library: Library = load_library()
        self._arena, self._copies = Arena(), Arena()
        self._left_for_copies = COPIES

    def pack_grouped(self, weight: Grouped, dtype: torch.dtype) -> Grouped:
        """See `QuantizedOps.pack_grouped`."""
        per_word = 32 // weight.bits
        if dtype != torch.bfloat16 or weight.group % per_word or weight.float8:
            return super().pack_grouped(weight, dtype)
        weight = _in_short_groups(weight)
        outputs, inputs = weight.shape
        scale, minimum = weight.scale.float(), _minimum(weight)
        kept = torch.float32
        if _is_half(scale) and (minimum is None or _is_half(minimum)):
            kept = torch.float16
        panels = -(-outputs // PANEL)
        codes = self._arena.take(panels * inputs // per_word * PANEL * 4).view(torch.int32)
        codes = codes.view(panels, inputs // per_word, PANEL)
        words = weight.codes.view(torch.int32)
        self._library.pack_codes(
            words.data_ptr(), outputs, words.shape[1], weight.bits, codes.data_ptr()
        )
        packed = _Panels(
            codes=codes,
            scale=self._panels(scale.to(kept)),
            bits=weight.bits,
            minimum=None if minimum is None else self._panels(minimum.to(kept)),
            table=_table(weight).bfloat16().repeat(2),
            middle=_middle(weight),
            order=weight.order,
            outputs=outputs,
            inputs=inputs,
        )
        if 2 * outputs * inputs <= self._left_for_copies:
            self._left_for_copies -= 2 * outputs * inputs
            packed.copy = self._widen(packed)
        return packed

    def pack_experts(self, experts: Experts, dtype: torch.dtype) -> Experts:
        """See `ExpertOps.pack_experts`: each expert has weights of its own."""
        num, h, width = experts.shape

        def packed(stack: Matrices, rows: int) -> list[Grouped]:
            assert isinstance(stack, Grouped)
            ends = [(e * rows, (e + 1) * rows) for e in range(num)]
            return [self.pack_grouped(rows_of(stack, slice(*end)), dtype) for end in ends]

        if not isinstance(experts.gate_up, Grouped):
            return experts
        return replace(
            experts, gate_up=packed(experts.gate_up, 2 * width), down=packed(experts.down, h)
        )

    def _widen(self, weight: _Panels) -> Tensor:
        """The weight in bfloat16, as `pack_linear` leaves one."""
        assert weight.table is not None
        copy = self._copies.take_panels(weight.outputs, weight.inputs)
        self._library.widen(
            weight.inputs,
            weight.codes.data_ptr(),
            weight.bits,
            weight.table.data_ptr(),
            weight.middle,
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
        return self._arena.take_panels(outputs, inputs)

    def _panels(self, rows: Tensor) -> Tensor:
        """[out, n] as [P, n, 32], zeros behind the last output."""
        padded = rows.new_zeros((-(-len(rows) // PANEL) * PANEL, rows.shape[1]))
        padded[: len(rows)] = rows
        room = self._arena.take(padded.nbytes).view(rows.dtype).view(-1, rows.shape[1], PANEL)
        return room.copy_(padded.view(-1, PANEL, rows.shape[1]).transpose(1, 2))

    def grouped_linear(self, x: Tensor, weight: Grouped, bias: Tensor | None = None) -> Tensor:
        """See `QuantizedOps.grouped_linear`."""
        if not isinstance(weight, _Panels):
            return super().grouped_linear(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.outputs)
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        self._multiply_grouped(x, weight, bias, out, is_float=False)
        return out

    def pack_head(self, weight: Tensor, stored: Grouped | None) -> Tensor | Grouped:
        """See `Ops.pack_head`: codes stand for what the file has, where 16 bits are rounded."""
        packed = None if stored is None else self.pack_grouped(stored, weight.dtype)
        return packed if isinstance(packed, _Panels) else self.pack_linear(weight)

    def scores(self, hidden: Tensor, weight: Tensor, packed: Tensor | Grouped) -> Tensor:
        """See `Ops.scores`. Sums are float32 already, and stay so."""
        if isinstance(packed, Tensor) and not is_packed(packed):
            return super().scores(hidden, weight, packed)
        out = hidden.new_empty(hidden.shape[0], packed.shape[0], dtype=torch.float32)
        if isinstance(packed, _Panels):
            self._multiply_grouped(hidden, packed, None, out, is_float=True)
        else:
            assert isinstance(packed, Tensor)
            self._multiply(hidden, packed, None, out, is_float=True)
        return out

    def _multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, is_float: bool
    ) -> None:
        x = x.contiguous()
        assert x.dtype == torch.bfloat16
        assert bias is None or bias.dtype == torch.bfloat16
        rows, inputs = x.shape
        self._library.linear(
            x.data_ptr(),
            rows,
            inputs,
            weight.data_ptr(),
            out.shape[1],
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            is_float,
        )

    def _multiply_grouped(
        self, x: Tensor, weight: _Panels, bias: Tensor | None, out: Tensor, *, is_float: bool
    ) -> None:
        """Few rows times codes, and many times a copy in bfloat16 where there is one."""
        if x.shape[0] > _FEWER and weight.copy is not None:
            self._multiply(x, weight.copy, bias, out, is_float=is_float)
            return
        x = x.contiguous()
        assert x.dtype == torch.bfloat16
        assert bias is None or bias.dtype == torch.bfloat16
        assert weight.table is not None
        failed = self._library.grouped(
            x.data_ptr(),
            x.shape[0],
            weight.inputs,
            weight.codes.data_ptr(),
            weight.bits,
            weight.table.data_ptr(),
            weight.middle,
            weight.scale.data_ptr(),
            None if weight.minimum is None else weight.minimum.data_ptr(),
            weight.scale.dtype == torch.float16,
            weight.scale.shape[1],
            weight.outputs,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            is_float,
            _FEW,
        )
        if failed:
            raise MemoryError("no memory for a panel of a weight")

    def pack_int8(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """See `QuantizedOps.pack_int8`."""
        if dtype != torch.bfloat16 or weight.shape[1] % 4:
            return super().pack_int8(weight, dtype)
        outputs, inputs = weight.shape
        room = self._arena.take(-(-outputs // PANEL) * PANEL * inputs)
        codes = weight.contiguous().view(torch.uint8) ^ 128
        self._library.pack_codes(codes.data_ptr(), outputs, inputs // 4, 8, room.data_ptr())
        return room[: outputs * inputs].view(torch.int8).view(outputs, inputs)

    def int8_linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """See `QuantizedOps.int8_linear`."""
        if x.dtype != torch.bfloat16 or weight.shape[1] % 4:
            return super().int8_linear(x, weight, scale, bias)
        x, scale = x.contiguous(), scale.contiguous()
        assert scale.dtype == torch.float32
        assert bias is None or bias.dtype == torch.bfloat16
        (rows, inputs), outputs = x.shape, weight.shape[0]
        room = x.new_empty(rows * (inputs + 8), dtype=torch.uint8)
        out = x.new_empty(rows, outputs)
        self._library.bytes(
            x.data_ptr(),
            rows,
            inputs,
            weight.data_ptr(),
            scale.data_ptr(),
            outputs,
            None if bias is None else bias.data_ptr(),
            room.data_ptr(),
            out.data_ptr(),
        )
        return out


def is_packed(weight: Tensor) -> bool:
    """Whether `NativeOps.pack_linear` brings weights of this type and shape into panels."""
    return weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0


def _in_short_groups(weight: Grouped) -> Grouped:
    """The same weight with no group above _LONGEST inputs: scales are repeated."""
    if weight.group <= _LONGEST:
        return weight
    step = 32 // weight.bits
    length = next(n for n in range(_LONGEST, 0, -step) if weight.group % n == 0)
    times = weight.group // length
    zero, minimum = weight.zero, weight.minimum
    return replace(
        weight,
        scale=weight.scale.repeat_interleave(times, 1),
        zero=None if zero is None else zero.repeat_interleave(times, 1),
        minimum=None if minimum is None else minimum.repeat_interleave(times, 1),
    )


def _minimum(weight: Grouped) -> Tensor | None:
    """What is added to each code times its scale, where codes count from zero."""
    if weight.minimum is not None:
        return weight.minimum
    return None if weight.zero is None else -weight.zero.float() * weight.scale.float()


def _middle(weight: Grouped) -> int:
    """What codes count from."""
    if weight.table is not None:
        return -1
    return 0 if weight.minimum is not None or weight.zero is not None else 2 ** (weight.bits - 1)


def _table(weight: Grouped) -> Tensor:
    """What codes of 4 bits count [16]."""
    return torch.arange(16.0) - _middle(weight) if weight.table is None else weight.table


def _is_half(values: Tensor) -> bool:
    """Whether float16 holds them without an error."""
    return torch.equal(values.half().float(), values)
