"""Mixtures of experts in plain torch: the chosen experts one after the other.

T tokens   E experts   C experts chosen per token   F expert width   h hidden size
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.execution.expert_ops import Clamp, Experts, Routing


class TorchExpertOps(ABC):
    """`ExpertOps` for `TorchOps`."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""

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

    def moe(self, x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
        """See `ExpertOps.moe`."""
        mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for e in sorted(set(chosen.flatten().tolist())):
            token, choice = torch.where(chosen == e)
            bias = None if experts.gate_up_bias is None else experts.gate_up_bias[e]
            gate_up = functional.linear(x[token], experts.gate_up[e], bias)
            clamp = experts.clamp
            inner = self.silu_mul(gate_up) if clamp is None else clamped_mul(gate_up, clamp)
            bias = None if experts.down_bias is None else experts.down_bias[e]
            out = functional.linear(inner, experts.down[e], bias).float()
            mixed.index_add_(0, token, out.mul_(weights[token, choice, None]))
        return mixed.to(x.dtype)


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
