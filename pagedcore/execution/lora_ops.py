"""Low-rank adapters of linear layers: what they are, and the operation that adds them.

    T tokens   L slots   R largest rank, padded   P parts of a layer, whose outputs it joins

An adapter's change of a part is B A: what is added to the part's output is B (A x). The adapters of
all slots lie in one tensor, so that the tokens of one step may have different ones.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

NO_ADAPTER = -1
"""The slot of tokens that have none."""


@dataclass(slots=True)
class LoraWeights:
    """The adapters of one linear layer, by slot; zero where an adapter has a smaller rank, or no
    part of this layer.
    """

    a: Tensor
    """[L, P * R, in], part by part."""

    b: Tensor
    """[L, out, R]. What scales an adapter is in it."""

    widths: tuple[int, ...]
    """[P] Outputs of each part."""

    part_widths: Tensor
    """[P] int32: the same, on the device."""

    present: Tensor
    """[L, P] int32: 0 where an adapter leaves a part as it is, so that nothing need be read."""

    is_adapted: bool = False
    """Whether any adapter that was ever there changes a part; if not, nothing need be called."""

    @property
    def rank(self) -> int:
        """R"""
        return self.b.shape[2]


@dataclass(slots=True)
class AdapterStep:
    """Which adapter each token of a step has."""

    slots: Tensor
    """[T] int32, or NO_ADAPTER."""

    num_single: int
    """The first so many tokens are of as many sequences; the others follow in runs."""

    groups: list[tuple[int, Tensor]] | None = None
    """What a backend on the host derives once: slots, and the indices of their tokens."""


class LoraOps(Protocol):
    """The part of a backend that adds adapters."""

    def add_lora(self, y: Tensor, x: Tensor, weights: LoraWeights, step: AdapterStep) -> None:
        """Add each token's adapter to y [T, out], in place: B (A x), for x [T, in] of y's type.

        A x may be rounded to that type. Tokens without an adapter stay as they are.
        """
        ...
