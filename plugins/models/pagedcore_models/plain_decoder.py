"""The way through the layers of models with LayerNorms: Cohere, StarCoder2, GPT-2 and OPT.

T tokens   S sequences   h hidden size   V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.layers import Head
from pagedcore.execution.ops import LayerCache, StepBatch
from pagedcore.execution.plain_layers import LearnedPositions


class Layer(Protocol):
    """What stands between embedding and head, several times."""

    cache_spec: CacheSpec

    def __call__(self, x: Tensor, batch: StepBatch, cache: LayerCache) -> Tensor:
        """x [T, h] to the same; x is given up."""
        ...


class PlainDecoder:
    """Embedding, layers, norm, head: a `pagedcore.execution.model.Model` but for its layers."""

    def __init__(
        self,
        vocab_size: int,
        *,
        embedding: Callable[[Tensor], Tensor],
        positions: LearnedPositions | None = None,
        layers: Sequence[Layer],
        norm: Callable[[Tensor], Tensor],
        head: Head,
        logit_scale: float = 1.0,
    ) -> None:
        """`embedding` maps token ids [T] to [T, h], to which those of `positions` are added."""
        self.vocab_size = vocab_size
        self.cache_specs: Sequence[CacheSpec | None] = [layer.cache_spec for layer in layers]
        self._embedding = embedding
        self._positions = positions
        self._layers = layers
        self._norm = norm
        self._head = head
        self._logit_scale = logit_scale

    def forward(
        self, token_ids: Tensor, batch: StepBatch, caches: Sequence[LayerCache | None]
    ) -> Tensor:
        """See `Model.forward`."""
        x = self._embedding(token_ids)
        if self._positions is not None:
            x += self._positions(batch.positions)
        for layer, cache in zip(self._layers, caches, strict=True):
            assert cache is not None, "attention keeps a cache"
            x = layer(x, batch, cache)
        return self._norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        scores = self._head(hidden)
        return scores if self._logit_scale == 1.0 else scores.mul_(self._logit_scale)
