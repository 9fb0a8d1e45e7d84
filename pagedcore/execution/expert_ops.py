"""Mixtures of experts: how tokens choose, what experts are, and the operations on both.

T tokens   E experts   C experts chosen per token   F expert width   h hidden size
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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


@dataclass(slots=True, kw_only=True)
class Experts:
    """E gated MLPs: expert e is down[e] (silu(gate x) * up x), unless `clamp` says otherwise."""

    gate_up: Tensor
    """[E, 2F, h], the gate's rows first."""

    down: Tensor
    """[E, h, F]"""

    gate_up_bias: Tensor | None = None
    """[E, 2F]"""

    down_bias: Tensor | None = None
    """[E, h]"""

    clamp: Clamp | None = None
    """Another activation."""


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

    def moe(self, x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
        """Mix experts over x [T, h] as `route` said: [T, h]. Each counts `weights` times."""
        ...
