"""Which tensors of a checkpoint are matrices that a model multiplies with.

The model itself says so: it is built on the device "meta" with a quantizer that takes matrices as
they are and remembers their names. So whatever architecture runs can be quantized.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.model import Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.plain_layers import TransposedWeights
from pagedcore.execution.quantized import Activations
from pagedcore.execution.quantizer import ExpertsMethod, LinearMethod, Unquantized
from pagedcore.execution.shard import Share

WEIGHT = ".weight"

Group = tuple[str, ...]
"""Layers that are multiplied with the same input, by the names that the checkpoint has."""

Observe = Callable[[Group, Tensor], None]
"""Is told what goes into a group, [T, in]."""


@dataclass(frozen=True, slots=True)
class Layers:
    """What can be quantized, and what cannot."""

    groups: tuple[Group, ...]
    """All layers, in the order in which the model takes them; each expert's matrices alone."""

    kept: tuple[str, ...]
    """Other matrices than embeddings, such as routers and the head: they stay as they are."""

    @property
    def names(self) -> frozenset[str]:
        """All layers that can be quantized."""
        return frozenset(name for group in self.groups for name in group)


class Logged:
    """`Weights` that remember which tensors were taken, by the checkpoint's own names."""

    def __init__(self, weights: Weights, taken: list[str]) -> None:
        self._weights = weights
        self._taken = taken

    @property
    def dtype(self) -> torch.dtype:
        """See `Weights.dtype`."""
        return self._weights.dtype

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """See `Weights.stored_shape`."""
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
        """See `Weights.take`."""
        self._taken.append(name)
        return self._weights.take(name, shape, dtype=dtype, dim=dim)

    def divide(self, layer: str, share: Share | None) -> None:
        """See `Weights.divide`."""
        self._weights.divide(layer, share)

    def ignore(self, prefix: str) -> None:
        """See `Weights.ignore`."""
        self._weights.ignore(prefix)


class Watcher(Unquantized):
    """A `Quantizer` that quantizes nothing, and knows which layers there are."""

    def __init__(self, taken: list[str], observe: Observe | None = None) -> None:
        """`taken` is what a `Logged` writes; `observe` is told all inputs of layers."""
        self.groups: list[Group] = []
        self._taken = taken
        self._observe = observe

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
        """See `Quantizer.linear`."""
        first = len(self._taken)
        method = super().linear(weights, ops, names, in_features, out_features, bias=bias, dim=dim)
        if isinstance(weights, TransposedWeights):  # formats would be read in another direction
            return method
        group = _layers(self._taken[first:])
        self.groups.append(group)
        return method if self._observe is None else _Observed(method, group, self._observe)

    def experts(
        self, weights: Weights, ops: Ops, prefix: str, num_experts: int, h: int, width: int
    ) -> ExpertsMethod:
        """See `Quantizer.experts`."""
        first = len(self._taken)
        method = super().experts(weights, ops, prefix, num_experts, h, width)
        self.groups += [(name,) for name in _layers(self._taken[first:])]
        return method


class _Observed:
    """A layer whose inputs are looked at."""

    def __init__(self, method: LinearMethod, group: Group, observe: Observe) -> None:
        self._method = method
        self._group = group
        self._observe = observe

    def apply(self, x: Activations) -> Tensor:
        """See `LinearMethod.apply`."""
        assert isinstance(x, Tensor), "nobody asked for 8 bits"
        self._observe(self._group, x)
        return self._method.apply(x)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `LinearMethod.wants_quantized`."""
        return False


def sort_layers(checkpoint: Checkpoint, groups: Sequence[Group]) -> Layers:
    """The layers that a `Watcher` saw, and the checkpoint's other matrices."""
    found = tuple(group for group in groups if group)
    names = {name for group in found for name in group}
    matrices = [
        name.removesuffix(WEIGHT)
        for name, tensor in checkpoint.stored.items()
        if name.endswith(WEIGHT) and len(tensor.shape) == 2
    ]
    kept = {name for name in matrices if name not in names and "embed" not in name}
    return Layers(found, tuple(sorted(kept | {"lm_head"})))


def _layers(taken: Sequence[str]) -> Group:
    return tuple(name.removesuffix(WEIGHT) for name in taken if name.endswith(WEIGHT))
