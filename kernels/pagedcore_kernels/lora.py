"""Adapters (LoRA): first A x of every token, then B (A x) added to what the layer gave.

    T tokens   L slots   R largest rank, padded   P parts of a layer   K inputs   N outputs

Where every token is a sequence of its own, adapters differ from token to token, and reading them is
all the traffic: 2 * R * (P * K + N) bytes each. A program takes one token and a piece of its
adapter that its registers hold, so that all of the piece is under way at once; and it asks for the
piece before it waits for its predecessors, since adapters and the tokens' slots are written before
the step's first layer. Tokens of longer runs share adapters: there a program takes neighbouring
tokens and the adapters that these have, one after the other, each for the tokens that have it.
Nothing is sorted, and nothing is read on the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore.execution.lora_ops import AdapterStep, LoraWeights
from pagedcore_kernels.dependent import can_depend

_RUN = 64
"""Tokens at a time of longer runs."""

_PIECE = 16384
"""Elements of an adapter that a program of a single token holds at a time: for the product with A;
that with B takes half. Smaller ones were faster alone, and slower between other kernels."""

_FEWEST_INPUTS = 1024
"""Of a part of the inputs: shorter ones take longer to add up than they gain."""

_MOST_PARTS = 16


@triton.jit
def _part_of(tile, widths, P: tl.constexpr, BLOCK_N: tl.constexpr):
    """First output of a tile, the end of the part that it is of, and which part that is."""
    begin, stop, part, at = 0, 0, 0, 0
    for p in tl.static_range(P):
        width = tl.load(widths + p)
        count = tl.cdiv(width, BLOCK_N)
        here = (tile >= 0) & (tile < count)
        begin = tl.where(here, at + tile * BLOCK_N, begin)
        stop = tl.where(here, at + width, stop)
        part = tl.where(here, p, part)
        tile -= count
        at += width
    return begin, stop, part


@triton.jit
def _shrink_single(
    x, a, inner, slots, present, x_stride, num_tokens,
    K: tl.constexpr, PR: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A x of one token: inner [PARTS, T, PR] float32, each part of some inputs.

    x [T, K] has rows `x_stride` apart; a [L, PR, K]; slots [T] int32, negative for none; present
    [L, P] int32. Where an adapter has none of this part of the layer, nothing is written.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    token, part = tl.program_id(0), tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    blocks: tl.constexpr = (K + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)
    slot = tl.load(slots + token)
    of_layer = tl.program_id(1) * BLOCK_R // R
    has = tl.load(present + slot * (PR // R) + of_layer, slot >= 0, 0) > 0
    matrix = a + slot.to(tl.int64) * PR * K + rows[:, None] * K
    source = x + token.to(tl.int64) * x_stride
    first = part * blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    early = tl.load(matrix + first[None, :], (first[None, :] < K) & has, 0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if has:
        value = tl.load(source + first, first < K, 0)
        total = early.to(tl.float32) * value.to(tl.float32)[None, :]
        for block in tl.static_range(1, blocks):
            columns = first + block * BLOCK_K
            weight = tl.load(matrix + columns[None, :], columns[None, :] < K, 0)
            value = tl.load(source + columns, columns < K, 0)
            total += weight.to(tl.float32) * value.to(tl.float32)[None, :]
        results = inner + (part * num_tokens + token).to(tl.int64) * PR + rows
        tl.store(results, tl.sum(total, 1))


@triton.jit
def _expand_single(
    y, b, inner, slots, present, widths, y_stride, num_tokens, num_outputs,
    R: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Add B times the sum of `inner` to BLOCK_N outputs of one token, all of one part.

    PARTS is a power of two; for the rest see `_expand`.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    begin, stop, part = _part_of(tl.program_id(1), widths, P, BLOCK_N)
    outputs = begin + tl.arange(0, BLOCK_N)
    valid = outputs < stop
    slot = tl.load(slots + token)
    has = tl.load(present + slot * P + part, slot >= 0, 0) > 0
    matrix = b + (slot.to(tl.int64) * num_outputs + outputs[:, None]) * R
    ranks = tl.arange(0, BLOCK_R)
    early = tl.load(matrix + ranks[None, :], valid[:, None] & has, 0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if has:
        places = y + token.to(tl.int64) * y_stride + outputs
        result = tl.load(places, valid, 0).to(tl.float32)
        row = (tl.arange(0, PARTS) * num_tokens + token).to(tl.int64) * (P * R) + part * R
        for r in tl.static_range(0, R, BLOCK_R):
            weight = early
            if r > 0:
                weight = tl.load(matrix + r + ranks[None, :], valid[:, None], 0)
            held = tl.sum(tl.load(inner + row[:, None] + r + ranks[None, :]), 0)
            result += tl.sum(weight.to(tl.float32) * held[None, :], 1)
        tl.store(places, result.to(y.dtype.element_ty), valid)


@triton.jit
def _slots_with(slots, inside, present, P: tl.constexpr, part):
    """The slots of tokens whose adapters change this part of the layer; -1 for all others."""
    slot = tl.load(slots, inside, -1)
    has = tl.load(present + slot * P + part, slot >= 0, 0)
    return tl.where(has > 0, slot, -1)


@triton.jit
def _shrink(
    x, a, inner, slots, present, first, x_stride, num_tokens,
    K: tl.constexpr, PR: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A x of tokens from `first` on: inner [PARTS, T, PR] float32, each part of some inputs.

    x [T, K] has rows `x_stride` apart; a [L, PR, K]; slots [T] int32, negative for none; present
    [L, P] int32.
    """
    tokens = first + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tokens < num_tokens
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2)
    blocks: tl.constexpr = (K + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)
    begin = part * blocks * BLOCK_K
    stop = tl.minimum(begin + blocks * BLOCK_K, K)
    left = _slots_with(slots + tokens, inside, present, PR // R, tl.program_id(1) * BLOCK_R // R)
    result = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    slot = tl.max(left, 0)
    while slot >= 0:
        own = left == slot
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        matrix = a + slot.to(tl.int64) * PR * K + rows[None, :] * K
        for k in range(begin, stop, BLOCK_K):
            columns = k + tl.arange(0, BLOCK_K)
            valid = columns < stop
            places = x + tokens[:, None].to(tl.int64) * x_stride + columns[None, :]
            piece = tl.load(places, own[:, None] & valid[None, :], 0)
            weight = tl.load(matrix + columns[:, None], valid[:, None], 0)
            total = tl.dot(piece, weight, total, input_precision=PRECISION)
        result = tl.where(own[:, None], total, result)
        left = tl.where(own, -1, left)
        slot = tl.max(left, 0)
    results = inner + (part * num_tokens + tokens[:, None]).to(tl.int64) * PR + rows[None, :]
    tl.store(results, result, inside[:, None])


@triton.jit
def _expand(
    y, b, inner, slots, present, widths, first, y_stride, num_tokens, num_outputs,
    R: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add B times the sum of `inner` to y [T, N], whose rows are `y_stride` apart.

    b [L, N, R]; widths [P] int32 are the outputs of the layer's parts. A program has BLOCK_N
    outputs of one part.
    """
    begin, stop, part = _part_of(tl.program_id(1), widths, P, BLOCK_N)
    outputs = begin + tl.arange(0, BLOCK_N)
    valid = outputs < stop
    tokens = first + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tokens < num_tokens
    left = _slots_with(slots + tokens, inside, present, P, part)
    adapted = left >= 0
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    slot = tl.max(left, 0)
    if slot < 0:
        return
    while slot >= 0:
        own = left == slot
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        matrix = b + (slot.to(tl.int64) * num_outputs + outputs[None, :]) * R
        for r in range(0, R, BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            weight = tl.load(matrix + ranks[:, None], valid[None, :], 0)
            held = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k in range(PARTS):
                row = (k * num_tokens + tokens[:, None]).to(tl.int64) * (P * R)
                held += tl.load(inner + row + part * R + ranks[None, :], own[:, None], 0)
            held = held.to(weight.dtype)
            total = tl.dot(held, weight, total, input_precision=PRECISION)
        result = tl.where(own[:, None], total, result)
        left = tl.where(own, -1, left)
        slot = tl.max(left, 0)
    places = y + tokens[:, None].to(tl.int64) * y_stride + outputs[None, :]
    mask = adapted[:, None] & valid[None, :]
    before = tl.load(places, mask, 0).to(tl.float32)
    tl.store(places, (before + result).to(y.dtype.element_ty), mask)


def add_lora(
    y: Tensor, x: Tensor, weights: LoraWeights, step: AdapterStep, *, num_sms: int
) -> None:
    """See `LoraOps.add_lora`. Rows of y and x may lie apart; their elements do not."""
    num_tokens, num_single = len(x), step.num_single
    if num_single:
        _add_single(y, x, weights, step.slots, num_single)
    if num_single < num_tokens:
        _add_runs(y, x, weights, step.slots, num_single, num_sms)


def _add_single(y: Tensor, x: Tensor, weights: LoraWeights, slots: Tensor, num_single: int) -> None:
    """Add the adapters of the first tokens, each of a sequence of its own."""
    rank, num_inner, num_inputs = weights.rank, weights.a.shape[1], x.shape[1]
    block_r = _power_of_two_in(rank, 16)
    block_k = min(_PIECE // block_r, triton.next_power_of_2(num_inputs))
    parts = min(triton.next_power_of_2(triton.cdiv(num_inputs, block_k)), _MOST_PARTS)
    inner = torch.empty((parts, num_single, num_inner), dtype=torch.float32, device=x.device)
    dependent = can_depend(x.device)
    _shrink_single[num_single, num_inner // block_r, parts](
        x, weights.a, inner, slots, weights.present, x.stride(0), num_single,
        K=num_inputs, PR=num_inner, R=rank, PARTS=parts, BLOCK_R=block_r, BLOCK_K=block_k,
        DEPENDENT=dependent, num_warps=4, launch_pdl=dependent,
    )  # fmt: skip
    ranks_at_once = _power_of_two_in(rank, 64)
    block_n = _PIECE // 2 // ranks_at_once
    tiles = sum(triton.cdiv(width, block_n) for width in weights.widths)
    _expand_single[num_single, tiles](
        y, weights.b, inner, slots, weights.present, weights.part_widths, y.stride(0),
        num_single, sum(weights.widths), R=rank, P=len(weights.widths), PARTS=parts,
        BLOCK_N=block_n, BLOCK_R=ranks_at_once, DEPENDENT=dependent, num_warps=4,
        launch_pdl=dependent,
    )  # fmt: skip


def _add_runs(
    y: Tensor, x: Tensor, weights: LoraWeights, slots: Tensor, first: int, num_sms: int
) -> None:
    """Add the adapters of all tokens from `first` on."""
    (num_tokens, num_inputs), rank, num_inner = x.shape, weights.rank, weights.a.shape[1]
    block_r = _power_of_two_in(rank, 64)
    groups = triton.cdiv(num_tokens - first, _RUN)
    wanted = triton.cdiv(2 * num_sms, groups * (num_inner // block_r))
    parts = max(1, min(wanted, num_inputs // _FEWEST_INPUTS, 8))
    inner = torch.empty((parts, num_tokens, num_inner), dtype=torch.float32, device=x.device)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    _shrink[groups, num_inner // block_r, parts](
        x, weights.a, inner, slots, weights.present, first, x.stride(0), num_tokens,
        K=num_inputs, PR=num_inner, R=rank, PARTS=parts, BLOCK_M=_RUN, BLOCK_R=block_r,
        BLOCK_K=64, PRECISION=precision, num_warps=4, num_stages=3,
    )  # fmt: skip
    block_n = 64
    tiles = sum(triton.cdiv(width, block_n) for width in weights.widths)
    _expand[groups, tiles](
        y, weights.b, inner, slots, weights.present, weights.part_widths, first, y.stride(0),
        num_tokens, sum(weights.widths), R=rank, P=len(weights.widths), PARTS=parts,
        BLOCK_M=_RUN, BLOCK_N=block_n, BLOCK_R=block_r, PRECISION=precision, num_warps=4,
    )  # fmt: skip


def _power_of_two_in(rank: int, most: int) -> int:
    """The largest power of two that divides a padded rank, at most `most`."""
    return min(rank & -rank, most)
