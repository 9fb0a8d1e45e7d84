"""Multiply the SiLU or the GELU of a gate by its partner; cap scores.

    T tokens   F width of the MLP   S sequences   V vocabulary

    gate_up    [T, 2F]   the gate first; 2F contiguous, T may have any stride
    out        [T, F]    contiguous, same dtype
    scores     [S, V]    contiguous; caps are written over them if they are float32

The grid is (T, cdiv(F, BLOCK)): one program makes BLOCK outputs of one token. It moves 3 * T * F
elements. Arithmetic is float32 with one rounding at the end. A program sees whole groups of BLOCK
outputs, so a variant that writes 8-bit values with one scale per group needs no second pass. Scores
are a flat run of S * V, of which a program reads and writes BLOCK.

`TorchOps.silu_mul`, `TorchOps.gelu_mul` and `TorchOps.cap_scores` are the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore_kernels.dependent import can_depend, wait_for_predecessors


@triton.jit
def _silu_mul_kernel(
    gate_up, out, gate_up_stride, width, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wait_for_predecessors(DEPENDENT)
    gate_up += token * gate_up_stride
    gate = tl.load(gate_up + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + width + column, inside, 0.0).to(tl.float32)
    tl.store(out + token * width + column, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def _gelu_mul_kernel(
    gate_up,
    out,
    gate_up_stride,
    width,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wait_for_predecessors(DEPENDENT)
    gate_up += token * gate_up_stride
    gate = tl.load(gate_up + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + width + column, inside, 0.0).to(tl.float32)
    if TANH:  # (1 + tanh(z)) / 2 is sigmoid(2 z), and 1.5957691216 is 2 sqrt(2 / pi)
        turned = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        share = tl.sigmoid(tl.maximum(turned, -80.0))  # whose exp does not overflow
    else:
        share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    tl.store(out + token * width + column, gate * share * up, inside)


@triton.jit
def _cap_scores_kernel(scores, out, count, cap, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    wait_for_predecessors(DEPENDENT)
    turned = 2 / cap * tl.load(scores + index, inside, 0.0).to(tl.float32)
    # tanh(z) is 2 sigmoid(2 z) - 1. Its exp does not overflow at -80, and NaN stays what it is:
    share = tl.sigmoid(tl.maximum(turned, -80.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + index, (2 * share - 1) * cap, inside)


def silu_mul(gate_up: Tensor, block: int = 1024, num_warps: int = 4) -> Tensor:
    """Return silu(gate) * up, [T, F], of gate_up [T, 2F]."""
    out = _halved(gate_up)
    tokens, width = out.shape
    if tokens:
        dependent = can_depend(gate_up.device)
        _silu_mul_kernel[(tokens, triton.cdiv(width, block))](
            gate_up,
            out,
            gate_up.stride(0),
            width,
            BLOCK=block,
            DEPENDENT=dependent,
            num_warps=num_warps,
            launch_pdl=dependent,
        )
    return out


def gelu_mul(gate_up: Tensor, *, tanh: bool, block: int = 1024, num_warps: int = 4) -> Tensor:
    """Return gelu(gate) * up, [T, F], of gate_up [T, 2F]."""
    out = _halved(gate_up)
    tokens, width = out.shape
    if tokens:
        dependent = can_depend(gate_up.device)
        _gelu_mul_kernel[(tokens, triton.cdiv(width, block))](
            gate_up,
            out,
            gate_up.stride(0),
            width,
            TANH=tanh,
            BLOCK=block,
            DEPENDENT=dependent,
            num_warps=num_warps,
            launch_pdl=dependent,
        )
    return out


def cap_scores(scores: Tensor, cap: float, block: int = 2048, num_warps: int = 4) -> Tensor:
    """Return cap * tanh(scores / cap), float32, of scores [S, V]."""
    scores = scores.contiguous()
    out = scores if scores.dtype == torch.float32 else torch.empty_like(scores, dtype=torch.float32)
    count = scores.numel()
    if count:
        dependent = can_depend(scores.device)
        _cap_scores_kernel[(triton.cdiv(count, block),)](
            scores,
            out,
            count,
            cap,
            BLOCK=block,
            DEPENDENT=dependent,
            num_warps=num_warps,
            launch_pdl=dependent,
        )
    return out


def _halved(gate_up: Tensor) -> Tensor:
    tokens, columns = gate_up.shape
    assert columns % 2 == 0 and gate_up.stride(1) == 1
    return torch.empty((tokens, columns // 2), dtype=gate_up.dtype, device=gate_up.device)
