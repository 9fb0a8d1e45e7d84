"""A weight format of our own: whole numbers of 8 bits, with one scale for each output.

    pagedcore serve MODEL --quantization my-int8

It rounds 16-bit weights while they are loaded; experts keep their type.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pagedcore import hookimpl
from pagedcore.errors import ModelError
from pagedcore.execution.model import Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantizer import Unquantized, take_linear
from pagedcore.testing.quantizer_case import QuantizerCase

pagedcore_requires = ">=1,<2"


@hookimpl
def pagedcore_quantizers():
    return {"my-int8": MyInt8}


@hookimpl
def pagedcore_quantizer_cases():
    case = QuantizerCase(settings={}, max_error=0.02, max_bytes=1.1, lies=[{"bits": 4}])
    return {"my-int8": case}


class MyInt8(Unquantized):
    """Everything but `linear` is as without quantization."""

    name = "my-int8"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if settings:
            raise ModelError(
                f"my-int8 is applied while loading and reads no checkpoint: {sorted(settings)} "
                "in config.json's quantization_config are another format's."
            )

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
    ) -> "Int8Linear":
        weight, added = take_linear(weights, names, in_features, out_features, bias=bias, dim=dim)
        return Int8Linear(weight, added)


class Int8Linear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # On the device "meta", where only shapes are looked at, all of this costs nothing.
        self._scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)
        self._codes = (weight.float() / self._scale[:, None]).round().to(torch.int8)
        self._bias = bias

    def apply(self, x: Tensor) -> Tensor:
        out = (x @ self._codes.to(x.dtype).T) * self._scale.to(x.dtype)
        return out if self._bias is None else out + self._bias

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        return False
