"""Weights of 8 bits that are multiplied with activations of 8 bits, as SmoothQuant has them.

Rows of activations are rounded while running, each to a scale of its own, whatever scale a
checkpoint has measured for them: that loses less, and needs nothing of the checkpoint.
"""

import torch
from torch import Tensor

from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import Activations


class Int8Linear:
    """A matrix of 8 bits: weight [out, in] int8, scale [out, 1] float32, bias [out] or None."""

    def __init__(
        self, ops: Ops, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        """`dtype` is that of activations."""
        self._ops = ops
        self._weight = weight if weight.is_meta else ops.pack_int8(weight, dtype)
        self._scale = scale
        self._bias = bias

    def apply(self, x: Activations) -> Tensor:
        """See `LinearMethod.apply`."""
        assert isinstance(x, Tensor), "nobody asked for float8"
        return self._ops.int8_linear(x, self._weight, self._scale, self._bias)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `LinearMethod.wants_quantized`: those would be float8."""
        return False
