"""Where adapters (LoRA) lie on the device, and the linear layers that add them.

    T tokens   L slots   R largest rank, padded   P parts of a layer

The pool is made before the model; layers that the model makes with an `AdaptedQuantizer` take their
share of it, whatever format their own weights have. All adapters of a layer lie in one tensor.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.errors import ConfigError
from pagedcore.execution.lora_ops import AdapterStep, LoraWeights
from pagedcore.execution.model import Model, Weights
from pagedcore.execution.ops import LayerCache, Ops, StepBatch
from pagedcore.execution.quantized import Activations
from pagedcore.execution.quantizer import ExpertsMethod, LinearMethod, Quantizer

RANK_MULTIPLE = 16
"""Ranks are padded to it: what tensor cores multiply at least."""


@dataclass(frozen=True, slots=True)
class AdapterMatrices:
    """The change of one part of a layer: B A."""

    a: Tensor
    """[r, in]"""

    b: Tensor
    """[out, r]. What scales the adapter is in it."""


@dataclass(frozen=True, slots=True)
class _Part:
    weights: LoraWeights
    index: int

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.weights.a.shape[2], self.weights.widths[self.index]


class AdapterPool:
    """Room for L adapters in every linear layer of one model."""

    def __init__(self, num_slots: int, max_rank: int, device: torch.device) -> None:
        self.device = device
        self.max_rank = max_rank
        self.step: AdapterStep | None = None
        """Of the step that runs; None where nobody has an adapter."""
        self.is_sealed = False
        """Whether the model is complete."""
        self.adapted_layers = 0
        """Number of the set of layers that adapters change: it grows when the set does."""
        self._num_slots = num_slots
        self._rank = -(-max_rank // RANK_MULTIPLE) * RANK_MULTIPLE
        self._parts: dict[str, _Part] = {}
        self._content: list[str | None] = [None] * num_slots

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each part that can have an adapter, by the checkpoint's names."""
        return {name: part.shape for name, part in self._parts.items()}

    def make(
        self, names: Sequence[str], in_features: int, widths: Sequence[int], dtype: torch.dtype
    ) -> LoraWeights:
        """Room in one linear layer, whose parts are called `names`."""
        slots, rank, device = self._num_slots, self._rank, self.device
        try:
            weights = LoraWeights(
                a=torch.zeros(slots, len(names) * rank, in_features, dtype=dtype, device=device),
                b=torch.zeros(slots, sum(widths), rank, dtype=dtype, device=device),
                widths=tuple(widths),
                part_widths=torch.tensor(widths, dtype=torch.int32, device=device),
                present=torch.zeros(slots, len(names), dtype=torch.int32, device=device),
            )
        except RuntimeError as error:  # what torch raises where memory runs out
            raise ConfigError(
                f"there is no memory for {slots} adapters of rank {rank}: lower max_loras or "
                "max_lora_rank"
            ) from error
        self._parts.update((name, _Part(weights, i)) for i, name in enumerate(names))
        return weights

    def drop(self, weights: LoraWeights) -> None:
        """This layer can have no adapter after all."""
        self._parts = {n: part for n, part in self._parts.items() if part.weights is not weights}

    def adapt(self, names: Iterable[str]) -> None:
        """An adapter of these parts has come: their layers are no longer those of the model."""
        layers = [self._parts[name].weights for name in names]
        if all(weights.is_adapted for weights in layers):
            return
        for weights in layers:
            weights.is_adapted = True
        self.adapted_layers += 1

    def place(self, slot: int, key: str, matrices: Mapping[str, AdapterMatrices]) -> None:
        """Copy an adapter, which `key` identifies, into a slot; nothing if it is there already.

        Copies from page-locked memory are not waited for; later steps come after them.
        """
        if self._content[slot] == key:
            return
        self._content[slot] = None
        layers = {id(part.weights): part.weights for part in self._parts.values()}
        for weights in layers.values():
            weights.a[slot].zero_()
            weights.b[slot].zero_()
            weights.present[slot].zero_()
        for name, own in matrices.items():
            part = self._parts[name]
            weights, rank = part.weights, len(own.a)
            first = part.index * self._rank
            weights.a[slot, first : first + rank].copy_(own.a, non_blocking=True)
            rows = weights.b[slot].split(weights.widths)[part.index]
            rows[:, :rank].copy_(own.b, non_blocking=True)
            weights.present[slot, part.index].fill_(1)
        self._content[slot] = key


class AdaptedLinear:
    """A `LinearMethod` with adapters on top."""

    def __init__(
        self, method: LinearMethod, ops: Ops, weights: LoraWeights, pool: AdapterPool
    ) -> None:
        self._method = method
        self._ops = ops
        self._weights: LoraWeights | None = weights
        self._pool = pool

    def apply(self, x: Activations) -> Tensor:
        """See `LinearMethod.apply`."""
        y = self._method.apply(x)
        if self._weights is None:
            return y
        step = self._pool.step
        if step is not None:
            assert isinstance(x, Tensor), "nobody asked for 8 bits"
            if self._weights.is_adapted:
                self._ops.add_lora(y, x, self._weights, step)
        elif not self._pool.is_sealed:  # the matrix becomes part of others while they are made
            self._pool.drop(self._weights)
            self._weights = None
        return y

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `LinearMethod.wants_quantized`: adapters multiply with the rows as they are."""
        return False


class AdaptedQuantizer:
    """A `Quantizer` whose linear layers have room for adapters; experts have none."""

    def __init__(self, quantizer: Quantizer, pool: AdapterPool) -> None:
        self.name = quantizer.name
        self._quantizer = quantizer
        self._pool = pool

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
        method = self._quantizer.linear(
            weights, ops, names, in_features, out_features, bias=bias, dim=dim
        )
        room = self._pool.make(names, in_features, out_features, weights.dtype)
        return AdaptedLinear(method, ops, room, self._pool)

    def experts(
        self, weights: Weights, ops: Ops, prefix: str, num_experts: int, h: int, width: int
    ) -> ExpertsMethod:
        """See `Quantizer.experts`."""
        return self._quantizer.experts(weights, ops, prefix, num_experts, h, width)


class AdaptedModel:
    """A `Model` that tells its layers which adapters a step's tokens have."""

    def __init__(self, model: Model, pool: AdapterPool) -> None:
        self.cache_specs: Sequence[CacheSpec | None] = model.cache_specs
        self.vocab_size = model.vocab_size
        self.supports_graphs: bool = getattr(model, "supports_graphs", True)
        self._model = model
        self._pool = pool
        pool.is_sealed = True

    def forward(
        self, token_ids: Tensor, batch: StepBatch, caches: Sequence[LayerCache | None]
    ) -> Tensor:
        """See `Model.forward`."""
        self._pool.step = batch.adapters
        try:
            return self._model.forward(token_ids, batch, caches)
        finally:
            self._pool.step = None

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        return self._model.logits(hidden)
