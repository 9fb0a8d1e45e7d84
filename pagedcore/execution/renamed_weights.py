"""Weights whose parts have other names in the checkpoint than a layer asks for."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pagedcore.execution.model import Weights
from pagedcore.execution.shard import Share


class RenamedWeights:
    """`Weights` of which some parts of names, between dots, are called something else.

    So every quantizer finds an expert's `gate_proj` in a checkpoint that says `w1`, with whatever
    scales are beside it. Errors say the checkpoint's names.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        """`names` are the checkpoint's, by those that are asked for."""
        self._weights = weights
        self._names = names

    @property
    def dtype(self) -> torch.dtype:
        """See `Weights.dtype`."""
        return self._weights.dtype

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """See `Weights.stored_shape`."""
        return self._weights.stored_shape(self._stored(name))

    def has(self, name: str) -> bool:
        """See `Weights.has`."""
        return self._weights.has(self._stored(name))

    def take(
        self,
        name: str,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        dim: int | None = None,
    ) -> Tensor:
        """See `Weights.take`."""
        return self._weights.take(self._stored(name), shape, dtype=dtype, dim=dim)

    def divide(self, layer: str, share: Share | None) -> None:
        """See `Weights.divide`."""
        self._weights.divide(self._stored(layer), share)

    def ignore(self, prefix: str) -> None:
        """See `Weights.ignore`."""
        self._weights.ignore(self._stored(prefix))

    def _stored(self, name: str) -> str:
        return ".".join(self._names.get(part, part) for part in name.split("."))
