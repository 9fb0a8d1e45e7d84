"""Experts as a format stores them: packed, where those of a layer are alike; else widened.

    T tokens   E experts   F expert width   h hidden size

All experts' gates and partners become one `Grouped`, and so does what is behind them. Experts that
are stored in several ways, whose inputs are in an order of their own (act-order), or of which no
whole groups lie in a row are widened to 16 bits while they are loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pagedcore.execution.expert_ops import Experts
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import Grouped, join_grouped
from pagedcore.execution.quantizer import ExpertsMethod, UnquantizedExperts
from pagedcore_quantization.packing import Part, plainest, widen_part

TakePart = Callable[[str, int, int, int], Part]
"""Gives the layer of a name, [rows, columns]; last, what may be divided."""


class GroupedExperts:
    """The packed experts of one layer."""

    def __init__(self, ops: Ops, experts: Experts, dtype: torch.dtype) -> None:
        """`dtype` is that of activations."""
        self._ops = ops
        self._experts = experts
        gate_up, down = experts.gate_up, experts.down
        assert isinstance(gate_up, Grouped), "others are UnquantizedExperts"
        assert isinstance(down, Grouped)
        if not gate_up.codes.is_meta:
            plain = replace(experts, gate_up=plainest(gate_up), down=plainest(down))
            self._experts = ops.pack_experts(plain, dtype)

    def apply(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """See `ExpertsMethod.apply`."""
        return self._ops.moe(x, weights, chosen, self._experts)


def make_experts(
    ops: Ops,
    take: TakePart,
    prefix: str,
    num_experts: int,
    h: int,
    width: int,
    dtype: torch.dtype,
) -> ExpertsMethod:
    """The experts `{prefix}.{e}.gate_proj`, `.up_proj` and `.down_proj`, e < E."""
    gate_up: list[Part] = []
    down: list[Part] = []
    for e in range(num_experts):
        gate_up.append(take(f"{prefix}.{e}.gate_proj", width, h, 0))
        gate_up.append(take(f"{prefix}.{e}.up_proj", width, h, 0))
        down.append(take(f"{prefix}.{e}.down_proj", h, width, 1))
    stacks = _stack(gate_up), _stack(down)
    if stacks[0] is not None and stacks[1] is not None:
        return GroupedExperts(ops, Experts(gate_up=stacks[0], down=stacks[1]), dtype)
    wide = Experts(
        gate_up=_widen(gate_up, num_experts, dtype), down=_widen(down, num_experts, dtype)
    )
    return UnquantizedExperts(ops, wide)


def _stack(parts: Sequence[Part]) -> Grouped | None:
    """The parts below each other, where all are packed, alike, and have their inputs in order."""
    packed = [part for part in parts if isinstance(part, Grouped) and part.order is None]
    return join_grouped(packed) if len(packed) == len(parts) else None


def _widen(parts: list[Part], num_experts: int, dtype: torch.dtype) -> Tensor:
    """The parts as one tensor [E, rows, columns]; they are given up one by one."""
    rows, columns = parts[0].shape
    wide: Tensor | None = None
    for index in range(len(parts)):
        part = parts[index]
        one = part if isinstance(part, Tensor) else widen_part(part, dtype)
        if wide is None:
            wide = one.new_empty((len(parts), rows, columns))
        wide[index] = one
        parts[index] = one.new_empty((0, 0))
    assert wide is not None, "a mixture has at least one expert"
    return wide.view(num_experts, -1, columns)
