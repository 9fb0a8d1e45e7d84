"""Choose experts for each token, and their weights.

    T tokens   E experts   C experts chosen per token

    router_logits    [T, E]            row-contiguous, any float type
    bias             [E] float32       added to scores for the choice alone; or none
    weights          [T, C] float32    contiguous
    chosen           [T, C] int32      contiguous

The grid is (T,): one program has the scores of one token in registers, in float32, and takes the
largest C times. Where experts stand in groups, the best groups are taken first in the same way. It
reads T * E logits and writes 8 * T * C bytes.

`TorchOps.route` is the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore.execution.expert_ops import Routing


@triton.jit
def _only_best_groups(
    ranked,
    e,
    num_experts,
    NUM_GROUPS: tl.constexpr,
    GROUPS_CHOSEN: tl.constexpr,
    GROUP_TERMS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Scores of one token, lowered where an expert is not in one of the best groups."""
    group = e // (num_experts // NUM_GROUPS)
    g = tl.arange(0, BLOCK_G)
    totals = tl.full([BLOCK_G], -1e30, tl.float32)
    for i in tl.static_range(NUM_GROUPS):
        own = tl.where(group == i, ranked, -1e30)
        total = tl.max(own, 0)
        if GROUP_TERMS == 2:
            total += tl.max(tl.where(e == tl.argmax(own, 0), -1e30, own), 0)
        totals = tl.where(g == i, total, totals)
    is_kept = group < 0
    for _ in tl.static_range(GROUPS_CHOSEN):
        best = tl.argmax(totals, 0)
        is_kept |= group == best
        totals = tl.where(g == best, -2e30, totals)
    return tl.where(is_kept, ranked, -1e30)


@triton.jit
def _route_kernel(
    logits,
    bias,
    chosen,
    weights,
    num_experts,
    scale,
    CHOSEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_CHOSEN: tl.constexpr,
    GROUP_TERMS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    exists = e < num_experts
    row = tl.load(logits + t * num_experts + e, exists, -float("inf")).to(tl.float32)
    if SIGMOID:
        p = 1 / (1 + tl.exp(-row))
    else:
        p = tl.exp(row - tl.max(row))
        p = p / tl.sum(p)
    ranked = p
    if HAS_BIAS:
        ranked += tl.load(bias + e, exists, 0.0)
    ranked = tl.where(exists, ranked, -1e30)
    if GROUPS_CHOSEN < NUM_GROUPS:
        ranked = _only_best_groups(
            ranked, e, num_experts, NUM_GROUPS, GROUPS_CHOSEN, GROUP_TERMS, BLOCK_G
        )
    c = tl.arange(0, BLOCK_C)
    ids = tl.zeros([BLOCK_C], tl.int32)
    probs = tl.zeros([BLOCK_C], tl.float32)
    for i in tl.static_range(CHOSEN):
        best = tl.argmax(ranked, 0)
        ids = tl.where(c == i, best, ids)
        probs = tl.where(c == i, tl.sum(tl.where(e == best, p, 0.0), 0), probs)
        ranked = tl.where(e == best, -2e30, ranked)
    if NORMALIZE:
        probs = probs / tl.sum(probs)
    ids = tl.minimum(ids, num_experts - 1)  # whatever NaN compares to, its expert exists
    tl.store(chosen + t * CHOSEN + c, ids, c < CHOSEN)
    tl.store(weights + t * CHOSEN + c, probs * scale, c < CHOSEN)


def route(
    router_logits: Tensor, routing: Routing, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [T, C] and experts [T, C]; see `ExpertOps.route`."""
    num_tokens, num_experts = router_logits.shape
    num_chosen, device = routing.num_chosen, router_logits.device
    assert router_logits.is_contiguous() and num_experts % routing.num_groups == 0
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    weights = torch.empty((num_tokens, num_chosen), dtype=torch.float32, device=device)
    chosen = torch.empty((num_tokens, num_chosen), dtype=torch.int32, device=device)
    _route_kernel[(num_tokens,)](
        router_logits,
        router_logits if bias is None else bias,
        chosen,
        weights,
        num_experts,
        routing.scale,
        CHOSEN=num_chosen,
        NORMALIZE=routing.normalize,
        SIGMOID=routing.sigmoid,
        HAS_BIAS=bias is not None,
        NUM_GROUPS=routing.num_groups,
        GROUPS_CHOSEN=routing.num_groups_chosen,
        GROUP_TERMS=routing.group_terms,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_G=triton.next_power_of_2(routing.num_groups),
        BLOCK_C=triton.next_power_of_2(num_chosen),
        num_warps=1,
    )
    return weights, chosen
