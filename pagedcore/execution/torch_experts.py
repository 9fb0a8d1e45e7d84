"""Mixtures of experts in plain torch: the chosen experts one after the other.

T tokens   E experts   C experts chosen per token   F expert width   h hidden size
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.execution.expert_ops import Clamp, Experts, Matrices, Routing
from pagedcore.execution.quantized import Grouped, rows_of


@dataclass(slots=True)
class OneExpert:
    """A gated MLP: gate_up [2F, h], the gate's rows first, and down [h, F], with their biases."""

    gate_up: Tensor | Grouped
    gate_up_bias: Tensor | None
    down: Tensor | Grouped
    down_bias: Tensor | None


class TorchExpertOps(ABC):
    """`ExpertOps` for `TorchOps`."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""

    @abstractmethod
    def grouped_linear(self, x: Tensor, weight: Grouped, bias: Tensor | None = None) -> Tensor:
        """See `QuantizedOps.grouped_linear`."""

    def route(
        self, router_logits: Tensor, routing: Routing, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `ExpertOps.route`."""
        logits = router_logits.float()
        scores = logits.sigmoid() if routing.sigmoid else logits.softmax(-1)
        ranked = scores if bias is None else scores + bias
        if routing.num_groups_chosen < routing.num_groups:
            ranked = _only_best_groups(ranked, routing)
        chosen = ranked.topk(routing.num_chosen, -1).indices
        weights = scores.gather(-1, chosen)
        if routing.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights if routing.scale == 1.0 else weights * routing.scale, chosen.int()

    def pack_experts(self, experts: Experts, dtype: torch.dtype) -> Experts:
        """See `ExpertOps.pack_experts`."""
        return experts

    def one_expert(self, experts: Experts, e: int, dtype: torch.dtype) -> OneExpert:
        """What expert e multiplies rows of `dtype` with."""
        gate_up_bias, down_bias = experts.gate_up_bias, experts.down_bias
        return OneExpert(
            _matrix(experts.gate_up, e, 2 * experts.shape[2]),
            None if gate_up_bias is None else gate_up_bias[e],
            _matrix(experts.down, e, experts.shape[1]),
            None if down_bias is None else down_bias[e],
        )

    def moe(self, x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
        """See `ExpertOps.moe`: of few bits, one chosen expert is in memory at a time."""
        mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for e in sorted(set(chosen.flatten().tolist())):
            token, choice = torch.where(chosen == e)
            one = self.one_expert(experts, e, x.dtype)
            gate_up = self._times(x[token], one.gate_up, one.gate_up_bias)
            clamp = experts.clamp
            inner = self.silu_mul(gate_up) if clamp is None else clamped_mul(gate_up, clamp)
            out = self._times(inner, one.down, one.down_bias).float()
            mixed.index_add_(0, token, out.mul_(weights[token, choice, None]))
        return mixed.to(x.dtype)

    def _times(self, x: Tensor, matrix: Tensor | Grouped, bias: Tensor | None) -> Tensor:
        if isinstance(matrix, Tensor):
            return functional.linear(x, matrix, bias)
        return self.grouped_linear(x, matrix, bias)


def _matrix(stack: Matrices, e: int, rows: int) -> Tensor | Grouped:
    """The matrix [rows, in] of expert e."""
    if isinstance(stack, Grouped):
        return rows_of(stack, slice(e * rows, (e + 1) * rows))
    return stack[e]


def clamped_mul(gate_up: Tensor, clamp: Clamp) -> Tensor:
    """The activation of gate_up [n, 2F], the gate first: [n, F]; see `Clamp`."""
    gate, up = gate_up.float().chunk(2, -1)
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    out: Tensor = ((up + 1) * gate * (gate * clamp.alpha).sigmoid()).to(gate_up.dtype)
    return out


def _only_best_groups(ranked: Tensor, routing: Routing) -> Tensor:
    """Scores [T, E], with -inf for experts outside of each token's best groups."""
    groups: Tensor = ranked.unflatten(-1, (routing.num_groups, -1))
    totals = groups.topk(routing.group_terms, -1).values.sum(-1)
    best = totals.topk(routing.num_groups_chosen, -1).indices
    is_out = torch.ones_like(totals, dtype=torch.bool).scatter_(-1, best, False)
    return groups.masked_fill(is_out[..., None], -torch.inf).flatten(-2)
