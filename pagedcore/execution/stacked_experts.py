"""Experts that a checkpoint stores in one tensor, gates and their partners in turn (GPT-OSS).

E experts   F expert width   h hidden size
"""

from typing import Protocol, runtime_checkable

from torch import Tensor

from pagedcore.execution.expert_ops import Clamp, Experts
from pagedcore.execution.model import Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantizer import ExpertsMethod, Quantizer, UnquantizedExperts


@runtime_checkable
class StacksExperts(Protocol):
    """What a `Quantizer` has whose format is one of stacked experts, too."""

    def stacked_experts(
        self,
        weights: Weights,
        ops: Ops,
        prefix: str,
        num_experts: int,
        h: int,
        width: int,
        clamp: Clamp,
    ) -> ExpertsMethod:
        """Take the experts that `{prefix}.gate_up_proj*` and `{prefix}.down_proj*` hold.

        As in `Quantizer.experts`, tensor parallelism divides their widths.
        """
        ...


def stacked_experts(
    quantizer: Quantizer,
    weights: Weights,
    ops: Ops,
    prefix: str,
    num_experts: int,
    h: int,
    width: int,
    clamp: Clamp,
) -> ExpertsMethod:
    """As the quantizer stores them, or in the model's type if it knows nothing of such experts."""
    if isinstance(quantizer, StacksExperts):
        return quantizer.stacked_experts(weights, ops, prefix, num_experts, h, width, clamp)
    gate_up_name, down_name = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
    gate_up = weights.take(gate_up_name, (num_experts, h, 2 * width), dim=2)
    down = weights.take(down_name, (num_experts, width, h), dim=1)
    if not gate_up.is_meta:
        gate_up, down = gates_first(gate_up.mT), down.mT.contiguous()
    gate_up_bias, down_bias = take_biases(weights, prefix, num_experts, h, width)
    return UnquantizedExperts(
        ops,
        Experts(
            gate_up=gate_up,
            down=down,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            clamp=clamp,
        ),
    )


def take_biases(
    weights: Weights, prefix: str, num_experts: int, h: int, width: int
) -> tuple[Tensor, Tensor]:
    """The biases [E, 2F], those of gates first, and [E, h]."""
    gate_up = weights.take(f"{prefix}.gate_up_proj_bias", (num_experts, 2 * width), dim=1)
    down = weights.take(f"{prefix}.down_proj_bias", (num_experts, h))
    return gate_up if gate_up.is_meta else gates_first(gate_up), down


def gates_first(rows: Tensor) -> Tensor:
    """Rows [E, 2F, ...], in which gates and partners take turns, with all gates first; a copy."""
    width = rows.shape[1] // 2
    out = rows.new_empty(rows.shape)
    out[:, :width], out[:, width:] = rows[:, 0::2], rows[:, 1::2]
    return out
