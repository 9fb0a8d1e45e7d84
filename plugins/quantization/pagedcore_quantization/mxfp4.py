"""MXFP4: experts of 4 bits, as GPT-OSS stores them; widened to the model's type while loading.

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
from pagedcore.execution.quantizer import (
    ExpertsMethod,
    LinearMethod,
    Unquantized,
    UnquantizedExperts,
)
from pagedcore.execution.stacked_experts import gates_first, take_biases

GROUP = 32
"""Inputs that share a scale."""

SCALE_OFFSET = 127
"""A scale of this number is 1."""

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
        dtype = gate_up_bias.dtype
        gate_up_shape, down_shape = (num_experts, 2 * width, h), (num_experts, h, width)
        gate_up = self._take(weights, f"{prefix}.gate_up_proj", gate_up_shape, dtype, dim=1)
        down = self._take(weights, f"{prefix}.down_proj", down_shape, dtype, dim=2)
        experts = Experts(
            gate_up=gate_up if gate_up.is_meta else gates_first(gate_up),
            down=down,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            clamp=clamp,
        )
        return UnquantizedExperts(ops, experts)

    def _take(
        self,
        weights: Weights,
        name: str,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        dim: int,
    ) -> Tensor:
        """Matrices [E, N, inputs] in `dtype`, of which one dimension may be divided."""
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
        shape = num_experts, blocks.shape[1], blocks.shape[2] * GROUP
        if blocks.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        wide = torch.empty(shape, dtype=dtype, device=blocks.device)
        for e in range(num_experts):  # one by one, since numbers are large on their way
            wide[e] = decode_mxfp4(blocks[e], scales[e], dtype)
        return wide


def decode_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers [..., 32 * G] in `dtype` of blocks [..., G, 16] and scales [..., G], both uint8.

    A scale of 255 stands for no number, and makes its group NaN.
    """
    values = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=blocks.device)
    low, high = values[(blocks & 15).int()], values[(blocks >> 4).int()]
    numbers = torch.stack([low, high], -1).flatten(-2)
    exponents = scales.int() - SCALE_OFFSET
    wide = torch.ldexp(numbers, exponents[..., None])
    wide.masked_fill_((scales == 255)[..., None], torch.nan)
    return wide.flatten(-2).to(dtype)
