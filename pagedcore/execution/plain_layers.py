"""The layers of models that came before Llama: LayerNorm, plain MLPs, learned positions.

    T tokens   h hidden size   F MLP width   P positions

As in `layers.py`, a layer takes its weights when it is made. None reads anything on the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.execution.layers import Attention, FeedForward, Linear
from pagedcore.execution.model import ModelBuild, Weights
from pagedcore.execution.ops import LayerCache, StepBatch
from pagedcore.execution.quantized import Activations
from pagedcore.execution.shard import Share

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}
"""By the names that a config.json has for them."""


class LayerNorm:
    """Normalises by mean and deviation, in float32 with one rounding at the end."""

    def __init__(
        self,
        build: ModelBuild,
        name: str,
        size: int,
        eps: float,
        *,
        weight: bool = True,
        bias: bool = True,
    ) -> None:
        """`weight` and `bias` say whether there is one."""
        self._weight = build.weights.take(f"{name}.weight", (size,)) if weight else None
        self._bias = build.weights.take(f"{name}.bias", (size,)) if bias else None
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, h] to [T, h]."""
        return functional.layer_norm(x, x.shape[-1:], self._weight, self._bias, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum, all [T, h]; the residual is given up."""
        total = residual.add_(x)
        return self(total), total


class PlainMLP:
    """down(activation(up(x)))."""

    def __init__(
        self,
        build: ModelBuild,
        names: Sequence[str],
        h: int,
        width: int,
        *,
        activation: str,
        bias: bool = True,
    ) -> None:
        """`names` are those of the two matrices, and `activation` is one of ACTIVATIONS."""
        up, down = names
        self._up = Linear(build, [up], h, [width], bias=bias, dim=0)
        self._activation = ACTIVATIONS[activation]
        self._down = Linear(build, [down], width, [h], bias=bias, dim=1)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `Consumer.wants_quantized`: no norm here leaves 8 bits behind."""
        return False

    def __call__(self, x: Activations) -> Tensor:
        """x [T, h] to [T, h]."""
        return self._down(self._activation(self._up(x)))


class LearnedPositions:
    """A vector for each position."""

    def __init__(
        self, build: ModelBuild, name: str, num_positions: int, h: int, *, offset: int = 0
    ) -> None:
        """Position 0 is row `offset` of the table, which has as many rows more."""
        self._weight = build.weights.take(f"{name}.weight", (num_positions + offset, h))[offset:]

    def __call__(self, positions: Tensor) -> Tensor:
        """Positions [T] to [T, h]."""
        return functional.embedding(positions, self._weight)


class PlainLayer:
    """Attention, then a feed-forward part; each behind a LayerNorm, and added to what it got."""

    def __init__(
        self,
        attention_norm: LayerNorm,
        attention: Attention,
        feed_forward_norm: LayerNorm,
        feed_forward: FeedForward,
    ) -> None:
        self.cache_spec = attention.cache_spec
        self._attention_norm = attention_norm
        self._attention = attention
        self._feed_forward_norm = feed_forward_norm
        self._feed_forward = feed_forward

    def __call__(self, x: Tensor, batch: StepBatch, cache: LayerCache) -> Tensor:
        """x [T, h] to the same; x is given up."""
        mixed = self._attention(self._attention_norm(x), batch, cache)
        normed, x = self._feed_forward_norm.add(mixed, x)
        return x.add_(self._feed_forward(normed))


class TransposedWeights:
    """`Weights` whose matrices are stored as [in, out], as GPT-2's are."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    @property
    def dtype(self) -> torch.dtype:
        """See `Weights.dtype`."""
        return self._weights.dtype

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """See `Weights.stored_shape`: as it is stored."""
        return self._weights.stored_shape(name)

    def has(self, name: str) -> bool:
        """See `Weights.has`."""
        return self._weights.has(name)

    def take(
        self,
        name: str,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        dim: int | None = None,
    ) -> Tensor:
        """See `Weights.take`; shape and `dim` are those of the matrix as it is multiplied with."""
        if len(shape) != 2:
            return self._weights.take(name, shape, dtype=dtype, dim=dim)
        stored = None if dim is None else 1 - dim
        matrix = self._weights.take(name, shape[::-1], dtype=dtype, dim=stored)
        if matrix.is_meta:  # where operations would load torch's compiler
            return matrix.new_empty(matrix.shape[::-1])
        return matrix.t().contiguous()

    def divide(self, layer: str, share: Share | None) -> None:
        """See `Weights.divide`."""
        self._weights.divide(layer, share)

    def ignore(self, prefix: str) -> None:
        """See `Weights.ignore`."""
        self._weights.ignore(prefix)


def transposed(build: ModelBuild) -> ModelBuild:
    """The same build, for layers whose matrices are stored as [in, out]."""
    return replace(build, weights=TransposedWeights(build.weights))
