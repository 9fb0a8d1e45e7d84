"""Mixtures of experts: how tokens choose, what experts are, and the operations on both.

T tokens   E experts   C experts chosen per token   F expert width   h hidden size
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pagedcore.execution.quantized import Grouped


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a token chooses: the `num_chosen` experts with the largest scores."""

    num_chosen: int
    """C"""

    normalize: bool
    """The weights of a token's experts sum to 1, before `scale`."""

    sigmoid: bool = False
    """Scores are sigmoids of the logits; otherwise their softmax."""

    num_groups: int = 1
    """Groups of E / num_groups experts beside each other; a token chooses groups first."""

    num_groups_chosen: int = 1
    """Groups whose experts it may choose."""

    group_terms: int = 1
    """A group counts as much as its one or two best experts together."""

    scale: float = 1.0
    """What weights are multiplied with at the end."""


@dataclass(frozen=True, slots=True)
class Clamp:
    """A gated activation with limits (GPT-OSS).

    The gate is at most `limit`, its partner within -limit .. limit, and the activation is
    (partner + 1) * gate * sigmoid(alpha * gate).
    """

    alpha: float
    limit: float


Matrices = Tensor | Grouped | Sequence[Grouped]
"""One of each expert."""


@dataclass(slots=True, kw_only=True)
class Experts:
    """E gated MLPs: expert e is down[e] (silu(gate x) * up x), unless `clamp` says otherwise.

    Both matrices are tensors, or both are weights of few bits: then those of all experts are one,
    below each other, and inputs stand in their order. A backend may make one for each expert.
    """

    gate_up: Matrices
    """[E, 2F, h], the gate's rows first; or [E * 2F, h]; or E of [2F, h]."""

    down: Matrices
    """[E, h, F]; or [E * h, F]; or E of [h, F]."""

    gate_up_bias: Tensor | None = None
    """[E, 2F]"""

    down_bias: Tensor | None = None
    """[E, h]"""

    clamp: Clamp | None = None
    """Another activation."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, h, F)."""
        if isinstance(self.down, Tensor):
            num, h, f = self.down.shape
            return num, h, f
        if isinstance(self.down, Grouped):
            assert isinstance(self.gate_up, Grouped)
            h = self.gate_up.shape[1]
            return self.down.shape[0] // h, h, self.down.shape[1]
        return len(self.down), *self.down[0].shape


class ExpertOps(Protocol):
    """The part of a backend that mixes experts."""

    def route(
        self, router_logits: Tensor, routing: Routing, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights [T, C] float32 and experts [T, C] int32, by router_logits [T, E].

        Scores are float32. `bias` [E] float32 is added to them where experts and groups are
        chosen; weights are the scores without it.
        """
        ...

    def pack_experts(self, experts: Experts, dtype: torch.dtype) -> Experts:
        """Experts of few bits in the layout that `moe` is fastest with; once, at the load.

        `dtype` is that of the rows to come. The result stands for the same experts, and only `moe`
        of the same backend may read it; the original is given up.
        """
        ...

    def moe(self, x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
        """Mix experts over x [T, h] as `route` said: [T, h]. Each counts `weights` times.

        `experts` are tensors, or come from `pack_experts`. The numbers of few bits may be rounded
        to x's dtype once.
        """
        ...
