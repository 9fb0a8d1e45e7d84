"""A mixture of experts: order by expert, two grouped products, combine. On the device alone.

    T tokens     h hidden size     E experts     C experts chosen per token     F expert width

    x                [T, h]         row-contiguous
    weights          [T, C]         float32, contiguous
    chosen           [T, C]         int32, contiguous: experts; see `expert_routing`
    gate_up          [E, 2F, h]     contiguous; the gate's rows first
    down             [E, h, F]      contiguous
    biases           [E, 2F] and [E, h], contiguous, or none
    out              [T, h]         x's dtype

An *assignment* is one token at one of its experts: A = T * C of them, number t * C + c. Kernels:

    order      (E,)          assignments sorted by expert: each program finds its expert's own
    gate_up    tiles * F/BN  act[a] = silu(x[t] gate') * (x[t] up'), float32 accumulation
    down       tiles * h/BN  part[a] = weight[a] * (act[a] down')
                             (biases are added to the products; `Clamp` is another activation)
    combine    (T, h/BN)     out[t] = sum of part[t * C ...], in order, in float32

A tile is BM assignments of one expert; see `expert_tiles`, which has the first and last of them.

Traffic: every touched expert's 3 * F * h weights once per tile of it, the activations A times. In
decode the weights are all of it: at 32 tokens and 8 of 128 experts, 87 % of the layer's experts are
read. `TorchOps.moe` is the specification in plain torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore.execution.expert_ops import Experts
from pagedcore_kernels.expert_tiles import combine, find_tile, sort_assignments


@triton.jit
def _gate_up(
    x,
    weight,
    bias,
    order,
    starts,
    counts,
    act,
    num_experts,
    H,
    F,
    alpha,
    limit,
    HAS_BIAS: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    CHOSEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_n = tl.cdiv(F, BN)
    pid = tl.program_id(0)
    expert, first, left = find_tile(pid // num_n, starts, counts, num_experts, BM, BLOCK_E)
    if left > 0:
        m = tl.arange(0, BM)
        a = tl.load(order + first + m, m < left, 0).to(tl.int64)
        n = (pid % num_n) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        inputs = x + (a // CHOSEN)[:, None] * H + k[None, :]
        gate = weight + expert.to(tl.int64) * 2 * F * H + n[None, :] * H + k[:, None]
        sum_gate = tl.zeros([BM, BN], tl.float32)
        sum_up = tl.zeros([BM, BN], tl.float32)
        for base in range(0, H, BK):
            inside = base + k < H
            rows = tl.load(inputs + base, (m < left)[:, None] & inside[None, :], 0.0)
            cols = (n < F)[None, :] & inside[:, None]
            g = tl.load(gate + base, cols, 0.0)
            u = tl.load(gate + F * H + base, cols, 0.0)
            sum_gate = tl.dot(rows, g, sum_gate, input_precision=PRECISION)
            sum_up = tl.dot(rows, u, sum_up, input_precision=PRECISION)
        if HAS_BIAS:
            own = bias + expert.to(tl.int64) * 2 * F + n
            sum_gate += tl.load(own, n < F, 0.0)[None, :]
            sum_up += tl.load(own + F, n < F, 0.0)[None, :]
        if HAS_CLAMP:
            sum_gate = tl.minimum(sum_gate, limit)
            sum_up = tl.clamp(sum_up, -limit, limit)
            result = sum_gate / (1 + tl.exp(-alpha * sum_gate)) * (sum_up + 1)
        else:
            result = sum_gate / (1 + tl.exp(-sum_gate)) * sum_up
        tl.store(act + a[:, None] * F + n[None, :], result, (m < left)[:, None] & (n < F)[None, :])


@triton.jit
def _down(
    act,
    weight,
    bias,
    order,
    starts,
    counts,
    scales,
    part,
    num_experts,
    H,
    F,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_n = tl.cdiv(H, BN)
    pid = tl.program_id(0)
    expert, first, left = find_tile(pid // num_n, starts, counts, num_experts, BM, BLOCK_E)
    if left > 0:
        m = tl.arange(0, BM)
        a = tl.load(order + first + m, m < left, 0).to(tl.int64)
        n = (pid % num_n) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        inputs = act + a[:, None] * F + k[None, :]
        columns = weight + expert.to(tl.int64) * H * F + n[None, :] * F + k[:, None]
        total = tl.zeros([BM, BN], tl.float32)
        for base in range(0, F, BK):
            inside = base + k < F
            rows = tl.load(inputs + base, (m < left)[:, None] & inside[None, :], 0.0)
            w = tl.load(columns + base, (n < H)[None, :] & inside[:, None], 0.0)
            total = tl.dot(rows, w, total, input_precision=PRECISION)
        if HAS_BIAS:
            total += tl.load(bias + expert.to(tl.int64) * H + n, n < H, 0.0)[None, :]
        total *= tl.load(scales + a, m < left, 0.0)[:, None]
        tl.store(part + a[:, None] * H + n[None, :], total, (m < left)[:, None] & (n < H)[None, :])


def _tiling(num_assignments: int, num_experts: int) -> tuple[int, int, int, int, int]:
    """BM, BN, BK, warps and stages: small tiles while experts see few tokens each."""
    per_expert = num_assignments / num_experts
    if per_expert <= 1:
        return 16, 32, 128, 4, 4
    if per_expert <= 16:
        return 16, 64, 128, 4, 4
    if per_expert <= 48:
        return 64, 64, 64, 4, 4
    return 128, 128, 64, 8, 3


def moe(x: Tensor, weights: Tensor, chosen: Tensor, mixture: Experts) -> Tensor:
    """Mix the chosen experts of each token; see the head of this file for the shapes."""
    num_chosen, device = chosen.shape[1], x.device
    num_experts, h, f = mixture.shape
    total = len(x) * num_chosen
    assert weights.is_contiguous()
    sorted_by = sort_assignments(chosen, num_experts)
    order, starts, counts = sorted_by.order, sorted_by.starts, sorted_by.counts
    act = torch.empty(total, f, dtype=x.dtype, device=device)
    part = torch.empty(total, h, dtype=x.dtype, device=device)
    out = torch.empty_like(x)
    bm, bn, bk, warps, stages = _tiling(total, num_experts)
    tiles = sorted_by.most_tiles(bm)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    block_e = triton.next_power_of_2(num_experts)
    shared = dict(BM=bm, BN=bn, BK=bk, BLOCK_E=block_e, PRECISION=precision)
    _gate_up[(tiles * triton.cdiv(f, bn),)](
        x,
        mixture.gate_up,
        x if mixture.gate_up_bias is None else mixture.gate_up_bias,
        order,
        starts,
        counts,
        act,
        num_experts,
        h,
        f,
        1.0 if mixture.clamp is None else mixture.clamp.alpha,
        0.0 if mixture.clamp is None else mixture.clamp.limit,
        HAS_BIAS=mixture.gate_up_bias is not None,
        HAS_CLAMP=mixture.clamp is not None,
        CHOSEN=num_chosen,
        **shared,
        num_warps=warps,
        num_stages=stages,
    )
    _down[(tiles * triton.cdiv(h, bn),)](
        act,
        mixture.down,
        x if mixture.down_bias is None else mixture.down_bias,
        order,
        starts,
        counts,
        weights,
        part,
        num_experts,
        h,
        f,
        HAS_BIAS=mixture.down_bias is not None,
        **shared,
        num_warps=warps,
        num_stages=stages,
    )
    combine(part, out, num_chosen)
    return out
