"""MXFP4: experts of 4 bits, as GPT-OSS stores them.

    E experts   F expert width   h hidden size   N outputs   G groups of 32 inputs

A number is a sign, two bits of exponent and one of fraction, of which two share a byte, the earlier
one in the lower half. Each group of 32 inputs has a power of two that its numbers count. All other
layers are in 16 bits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.expert_ops import Clamp, Experts
from pagedcore.execution.model import Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import Grouped
from pagedcore.execution.quantizer import (
    ExpertsMethod,
    LinearMethod,
    Unquantized,
)
from pagedcore.execution.stacked_experts import gates_first, take_biases
from pagedcore_quantization.experts import GroupedExperts

GROUP = 32
"""Inputs that share a scale."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Mxfp4:
    """A `Quantizer` for checkpoints whose experts are stored in 4 bits."""

    name = "mxfp4"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raises ModelError for a checkpoint that is stored otherwise, or not quantized at all."""
        if settings.get("quant_method") != self.name:
            raise ModelError(
                "mxfp4 is a format that a checkpoint is stored in, and the quantization_config of "
                f"this one's config.json says {settings.get('quant_method')!r:.40}. Leave out "
                "--quantization, or use fp8, which rounds weights while they are loaded."
            )
        self._fields = ConfigFields(settings, "quantization_config.")

    def linear(
        self,
        weights: Weights,
        ops: Ops,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool,
        dim: int | None,
    ) -> LinearMethod:
        """See `Quantizer.linear`: a matrix of 16 bits."""
        return Unquantized().linear(
            weights, ops, names, in_features, out_features, bias=bias, dim=dim
        )

    def experts(
        self, weights: Weights, ops: Ops, prefix: str, num_experts: int, h: int, width: int
    ) -> ExpertsMethod:
        """See `Quantizer.experts`: those with a tensor each are in 16 bits."""
        return Unquantized().experts(weights, ops, prefix, num_experts, h, width)

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
        """See `StacksExperts`."""
        gate_up_bias, down_bias = take_biases(weights, prefix, num_experts, h, width)
        gate_up_shape, down_shape = (num_experts, 2 * width, h), (num_experts, h, width)
        gate_up, up_scales = self._take(weights, f"{prefix}.gate_up_proj", gate_up_shape, dim=1)
        down = self._take(weights, f"{prefix}.down_proj", down_shape, dim=2)
        if not gate_up.is_meta:
            gate_up, up_scales = gates_first(gate_up), gates_first(up_scales)
        experts = Experts(
            gate_up=float4(gate_up.flatten(0, 1), up_scales.flatten(0, 1)),
            down=float4(*(part.flatten(0, 1) for part in down)),
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            clamp=clamp,
        )
        return GroupedExperts(ops, experts, gate_up_bias.dtype)

    def _take(
        self, weights: Weights, name: str, shape: tuple[int, int, int], *, dim: int
    ) -> tuple[Tensor, Tensor]:
        """Matrices [E, N, G, 16] and their scales [E, N, G], of which `dim` may be divided."""
        num_experts, rows, inputs = shape
        if inputs % GROUP:
            raise self._fields.error(
                "quant_method", f"cannot store {name}: its {inputs} inputs are no multiple of 32"
            )
        groups = inputs // GROUP
        blocks = weights.take(
            f"{name}_blocks", (num_experts, rows, groups, GROUP // 2), dtype=torch.uint8, dim=dim
        )
        scales = weights.take(
            f"{name}_scales", (num_experts, rows, groups), dtype=torch.uint8, dim=dim
        )
        return blocks, scales


def float4(blocks: Tensor, scales: Tensor) -> Grouped:
    """The weight [N, 32 * G] of blocks [N, G, 16] and scales [N, G], both uint8.

    A scale is the exponent of a power of two, plus 127; 255 stands for no number.
    """
    table = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=blocks.device)
    return Grouped(blocks.flatten(1), scales.view(torch.float8_e8m0fnu), 4, table=table)
