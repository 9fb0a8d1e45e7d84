"""A model's share of its weights, for one of several ranks: see `shard.py`.

Layers say which dimension is divided, and quantizers pass that on for each tensor that a format
has. So the share is taken here, in whatever pieces a tensor is stored, and no format needs to know
of ranks: a matrix whose inputs are divided is one of fewer inputs, whose products are added up.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.expert_ops import Clamp
from pagedcore.execution.model import Model, ModelBuild, Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import Activations
from pagedcore.execution.quantizer import ExpertsMethod, LinearMethod, Quantizer
from pagedcore.execution.shard import Collective, Shard, Share, cut
from pagedcore.execution.stacked_experts import stacked_experts


def divided(build: ModelBuild, shard: Shard, model_class: type[Model]) -> ModelBuild:
    """The build with which `model_class` makes a rank's share of a model.

    A single rank gets the build as it is. Raises ModelError for a class that cannot be divided.
    """
    if shard.size == 1:
        return build
    if not getattr(model_class, "supports_shards", True):
        raise ModelError(
            f"{model_class.__name__} cannot be divided: tensor_parallel_size must be 1, "
            f"not {shard.size}"
        )
    return replace(
        build,
        weights=DividedWeights(build.weights, shard),
        quantizer=DividedQuantizer(build.quantizer, shard),
        shard=shard,
    )


@runtime_checkable
class TakesPieces(Protocol):
    """What `Weights` have that can read a part of a tensor without reading all of it."""

    def take_pieces(
        self,
        name: str,
        shape: Sequence[int],
        dim: int,
        pieces: Sequence[range],
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As `Weights.take`, but only `pieces` of one dimension, behind each other."""
        ...


class DividedWeights:
    """`Weights` of which `take` gives a rank its share of the dimension `dim`.

    Others than those of a checkpoint, such as random numbers, are taken whole and cut: a rank has
    the numbers that a model in one piece has there.
    """

    def __init__(self, weights: Weights, shard: Shard) -> None:
        self._weights = weights
        self._shard = shard
        self._shares: dict[str, Share | None] = {}

    @property
    def dtype(self) -> torch.dtype:
        """See `Weights.dtype`."""
        return self._weights.dtype

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """See `Weights.stored_shape`: of the whole tensor."""
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
        """See `Weights.take`.

        Raises ModelError for a matrix of a divided layer that is asked for without `dim`: whoever
        asks does not know of ranks, and all that follows would be wrong.
        """
        layer = self._find(name)
        share = None if layer is None else self._shares[layer]
        if layer is not None and share is None:
            whole = self._weights.take(name, shape, dtype=dtype)
            return whole if self._shard.rank == 0 or whole.is_meta else whole.zero_()
        if dim is None:
            if share is not None and sum(size > 1 for size in shape) > 1:
                raise ModelError(
                    f"{name!r} belongs to a layer that is divided between ranks, and its format "
                    "or its model takes it whole: tensor_parallel_size must be 1"
                )
            return self._weights.take(name, shape, dtype=dtype)
        count = shape[dim]
        pieces = (share or self._shard.even(f"the pieces of {name!r}", count)).pieces(name, count)
        if isinstance(self._weights, TakesPieces):
            return self._weights.take_pieces(name, shape, dim, pieces, dtype=dtype)
        return cut(self._weights.take(name, shape, dtype=dtype), dim, pieces)

    def divide(self, layer: str, share: Share | None) -> None:
        """See `Weights.divide`."""
        self._shares[layer] = share

    def ignore(self, prefix: str) -> None:
        """See `Weights.ignore`."""
        self._weights.ignore(prefix)

    def _find(self, name: str) -> str | None:
        """The innermost layer that a tensor belongs to and whose share was told."""
        while name:
            if name in self._shares:
                return name
            name = name.rpartition(".")[0]
        return None


class SummedLinear:
    """A `LinearMethod` of a matrix whose inputs are divided."""

    def __init__(self, method: LinearMethod, collective: Collective) -> None:
        self._method = method
        self._collective = collective

    def apply(self, x: Activations) -> Tensor:
        """See `LinearMethod.apply`."""
        return self._collective.all_reduce(self._method.apply(x))

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `LinearMethod.wants_quantized`."""
        return self._method.wants_quantized(num_tokens, dtype)


class SummedExperts:
    """An `ExpertsMethod` of experts whose widths are divided."""

    def __init__(self, method: ExpertsMethod, collective: Collective) -> None:
        self._method = method
        self._collective = collective

    def apply(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """See `ExpertsMethod.apply`."""
        return self._collective.all_reduce(self._method.apply(x, weights, chosen))


class DividedQuantizer:
    """A `Quantizer` that adds up, over all ranks, products of which each rank has some terms."""

    def __init__(self, quantizer: Quantizer, shard: Shard) -> None:
        self.name = quantizer.name
        self._quantizer = quantizer
        self._shard = shard

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
        """See `Quantizer.linear`. `Linear` has told the shares."""
        if dim == 1:
            for name in names:
                weights.divide(f"{name}.bias", None)
        method = self._quantizer.linear(
            weights, ops, names, in_features, out_features, bias=bias, dim=dim
        )
        return method if dim != 1 else SummedLinear(method, self._shard.collective)

    def experts(
        self, weights: Weights, ops: Ops, prefix: str, num_experts: int, h: int, width: int
    ) -> ExpertsMethod:
        """See `Quantizer.experts`: every rank has a part of each expert's width."""
        self._divide_experts(weights, prefix, width)
        method = self._quantizer.experts(weights, ops, prefix, num_experts, h, width)
        return SummedExperts(method, self._shard.collective)

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
        self._divide_experts(weights, prefix, width)
        weights.divide(f"{prefix}.down_proj_bias", None)
        method = stacked_experts(
            self._quantizer, weights, ops, prefix, num_experts, h, width, clamp
        )
        return SummedExperts(method, self._shard.collective)

    def _divide_experts(self, weights: Weights, prefix: str, width: int) -> None:
        weights.divide(prefix, self._shard.even(f"the widths of {prefix}", width))
