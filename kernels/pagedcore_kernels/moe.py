"""A mixture of experts: route, order by expert, two grouped products, combine. On the device alone.

    T tokens     h hidden size     E experts     C experts chosen per token     F expert width

    x                [T, h]         row-contiguous
    router_logits    [T, E]         row-contiguous, any float type
    gate_up          [E, 2F, h]     contiguous; the gate's rows first
    down             [E, h, F]      contiguous
    out              [T, h]         x's dtype

An *assignment* is one token at one of its experts: A = T * C of them, number t * C + c. Kernels:

    route      (T,)          softmax over E in float32, the C largest, their weights
    order      (E,)          assignments sorted by expert: each program finds its expert's own
    gate_up    tiles * F/BN  act[a] = silu(x[t] gate') * (x[t] up'), float32 accumulation
    down       tiles * h/BN  part[a] = weight[a] * (act[a] down')
    combine    (T, h/BN)     out[t] = sum of part[t * C ...], in order, in float32

A tile is BM assignments of one expert. The number of tiles is known to the device only; the grid
is its upper bound A / BM + E, and a program beyond the last tile returns. Each program finds its
expert by a running sum over the E counts, so no list of tiles is ever written.

Traffic: every touched expert's 3 * F * h weights once per tile of it, the activations A times. In
decode the weights are all of it: at 32 tokens and 8 of 128 experts, 87 % of the layer's experts are
read. `TorchOps.moe` is the specification in plain torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _route(
    logits,
    experts,
    weights,
    num_experts,
    scale,
    CHOSEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    row = tl.load(logits + t * num_experts + e, e < num_experts, -float("inf")).to(tl.float32)
    p = tl.exp(row - tl.max(row))
    p = tl.where(e < num_experts, p / tl.sum(p), -1.0)
    c = tl.arange(0, BLOCK_C)
    ids = tl.zeros([BLOCK_C], tl.int32)
    probs = tl.zeros([BLOCK_C], tl.float32)
    for i in tl.static_range(CHOSEN):
        best = tl.argmax(p, 0)
        ids = tl.where(c == i, best, ids)
        probs = tl.where(c == i, tl.max(p, 0), probs)
        p = tl.where(e == best, -1.0, p)
    if NORMALIZE:
        probs = probs / tl.sum(probs)
    tl.store(experts + t * CHOSEN + c, ids, c < CHOSEN)
    tl.store(weights + t * CHOSEN + c, probs * scale, c < CHOSEN)


@triton.jit
def _order(experts, order, starts, counts, num_assignments, BLOCK: tl.constexpr):
    mine = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    before = 0
    count = 0
    for base in range(0, num_assignments, BLOCK):
        e = tl.load(experts + base + i, base + i < num_assignments, 1 << 30)
        before += tl.sum((e < mine).to(tl.int32))
        count += tl.sum((e == mine).to(tl.int32))
    tl.store(starts + mine, before)
    tl.store(counts + mine, count)
    if count > 0:
        for base in range(0, num_assignments, BLOCK):
            e = tl.load(experts + base + i, base + i < num_assignments, 1 << 30)
            hit = (e == mine).to(tl.int32)
            rank = tl.cumsum(hit, 0) - 1
            tl.store(order + before + rank, base + i, hit == 1)
            before += tl.sum(hit)


@triton.jit
def _find_tile(tile, starts, counts, num_experts, BM: tl.constexpr, BLOCK_E: tl.constexpr):
    """Expert of a tile, its first assignment in `order`, and how many it has; none beyond."""
    e = tl.arange(0, BLOCK_E)
    count = tl.load(counts + e, e < num_experts, 0)
    tiles = (count + BM - 1) // BM
    end = tl.cumsum(tiles, 0)
    expert = tl.sum((end <= tile).to(tl.int32))
    here = e == expert
    skipped = (tile - tl.sum(tl.where(here, end - tiles, 0))) * BM
    left = tl.sum(tl.where(here, count, 0)) - skipped
    first = tl.load(starts + expert, expert < num_experts, 0) + skipped
    return expert, first, tl.where(expert < num_experts, left, 0)


@triton.jit
def _gate_up(
    x,
    weight,
    order,
    starts,
    counts,
    act,
    num_experts,
    H,
    F,
    CHOSEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_n = tl.cdiv(F, BN)
    pid = tl.program_id(0)
    expert, first, left = _find_tile(pid // num_n, starts, counts, num_experts, BM, BLOCK_E)
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
        result = sum_gate / (1 + tl.exp(-sum_gate)) * sum_up
        tl.store(act + a[:, None] * F + n[None, :], result, (m < left)[:, None] & (n < F)[None, :])


@triton.jit
def _down(
    act,
    weight,
    order,
    starts,
    counts,
    scales,
    part,
    num_experts,
    H,
    F,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_n = tl.cdiv(H, BN)
    pid = tl.program_id(0)
    expert, first, left = _find_tile(pid // num_n, starts, counts, num_experts, BM, BLOCK_E)
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
        total *= tl.load(scales + a, m < left, 0.0)[:, None]
        tl.store(part + a[:, None] * H + n[None, :], total, (m < left)[:, None] & (n < H)[None, :])


@triton.jit
def _combine(part, out, H, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(CHOSEN):
        total += tl.load(part + (t * CHOSEN + c) * H + n, n < H, 0.0).to(tl.float32)
    tl.store(out + t * H + n, total, n < H)


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


def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    num_chosen: int,
    *,
    normalize: bool,
    scale: float = 1.0,
) -> Tensor:
    """Mix `num_chosen` experts per token; see the head of this file for the shapes."""
    num_tokens, h = x.shape
    num_experts, f = down.shape[0], down.shape[2]
    device = x.device
    total = num_tokens * num_chosen
    experts = torch.empty(total, dtype=torch.int32, device=device)
    weights = torch.empty(total, dtype=torch.float32, device=device)
    order = torch.empty(total, dtype=torch.int32, device=device)
    starts = torch.empty(num_experts, dtype=torch.int32, device=device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    act = torch.empty(total, f, dtype=x.dtype, device=device)
    part = torch.empty(total, h, dtype=x.dtype, device=device)
    out = torch.empty_like(x)
    block_e = triton.next_power_of_2(num_experts)
    _route[(num_tokens,)](
        router_logits,
        experts,
        weights,
        num_experts,
        scale,
        CHOSEN=num_chosen,
        NORMALIZE=normalize,
        BLOCK_E=block_e,
        BLOCK_C=triton.next_power_of_2(num_chosen),
        num_warps=1,
    )
    block = min(4096, max(128, triton.next_power_of_2(total)))
    _order[(num_experts,)](experts, order, starts, counts, total, BLOCK=block, num_warps=4)
    bm, bn, bk, warps, stages = _tiling(total, num_experts)
    tiles = total // bm + min(num_experts, total)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    shared = dict(BM=bm, BN=bn, BK=bk, BLOCK_E=block_e, PRECISION=precision)
    _gate_up[(tiles * triton.cdiv(f, bn),)](
        x,
        gate_up,
        order,
        starts,
        counts,
        act,
        num_experts,
        h,
        f,
        CHOSEN=num_chosen,
        **shared,
        num_warps=warps,
        num_stages=stages,
    )
    _down[(tiles * triton.cdiv(h, bn),)](
        act,
        down,
        order,
        starts,
        counts,
        weights,
        part,
        num_experts,
        h,
        f,
        **shared,
        num_warps=warps,
        num_stages=stages,
    )
    block = min(1024, triton.next_power_of_2(h))
    _combine[(num_tokens, triton.cdiv(h, block))](
        part, out, h, CHOSEN=num_chosen, BLOCK=block, num_warps=4
    )
    return out
