"""Multiply rows with a weight of 4 or 8 bits, which is unpacked in registers.

    M rows   N outputs   K inputs   B blocks of 128 inputs   P parts of the blocks

    x         [M, K]      K contiguous, M may have any stride; bfloat16, float16 or float32
    weight    [N, K]      as `packed_layout` lays it out
    bias      [N]         contiguous, same dtype as x; optional
    partial   [P, tiles of M and N, BN, BM]   float32 scratch, where P > 1
    arrivals  [tiles of M and N]              int32, zero before and after; where P > 1
    out       [M, N]      contiguous, same dtype as x

For few rows, the packed weight is the traffic. It is the left factor of a product on tensor cores,
so that eight rows of x are enough for a tile; codes become weights in the registers from which that
product reads (see `packed_codes`), and the scale of a group multiplies the group's sum. The sum
over K is cut as in `small_linear`: SLICES belong to warps, P parts to programs, of which the last
to arrive adds them in their order. So results are the same in every run.

Weights are exact in 16 bits but for their scale, products exact, sums float32; the result is
rounded once. For up to 16 rows `packed_strips` is faster, where it runs. For many rows `widen`
writes the weight in x's dtype, piece by piece, and the vendor's library multiplies.
"""

import torch
import triton
from torch import Tensor

from pagedcore_kernels.packed_codes import assembly
from pagedcore_kernels.packed_kernel import packed_kernel
from pagedcore_kernels.packed_layout import ROWS, Packed
from pagedcore_kernels.packed_plans import (
    SHARED_MEMORY,
    PackedPlan,
    choose_plan,
    fit,
    rows_per_program,
)
from pagedcore_kernels.packed_widen import format_of, multiply_widened
from pagedcore_kernels.small_linear import Scratch

MAX_WIDE_ROWS = 16
"""In float32, which is multiplied without tensor cores."""

_SHORT = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None = None,
    scratch: Scratch | None = None,
    *,
    plan: PackedPlan | None = None,
    dependent: bool = False,
    shared_memory: int = SHARED_MEMORY,
) -> Tensor:
    """x [M, K] times a packed weight [N, K], plus bias [N]: [M, N] in x's dtype.

    The columns of x are in the weight's order. Without scratch, K is never cut between programs. A
    `dependent` kernel may start while the one before it ends, and waits for it before it reads
    anything but the weight.
    """
    num_rows = len(x)
    if plan is None:
        plan = choose_plan(num_rows, *weight.shape, weight.quarter)
    if plan is not None:
        of_rows = 4 * weight.quarter * x.itemsize
        if weight.zero is not None:  # what the compiler copies
            shared_memory -= 2 * plan.bn * weight.block_bytes
        plan = fit(plan, num_rows, weight.block_bytes, of_rows, shared_memory)
    if plan is None or (x.dtype == torch.float32 and num_rows > MAX_WIDE_ROWS):
        return multiply_widened(x, weight, bias)
    out = torch.empty((num_rows, weight.num_outputs), dtype=x.dtype, device=x.device)
    if num_rows:
        _multiply(x, weight, bias, out, plan, scratch, dependent)
    return out


def _multiply(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    out: Tensor,
    plan: PackedPlan,
    scratch: Scratch | None,
    dependent: bool,
) -> None:
    num_rows, num_inputs = x.shape
    strips, num_blocks = weight.codes.shape[:2]
    assert num_inputs == weight.num_inputs and x.stride(1) == 1
    bm = rows_per_program(num_rows)
    grid = triton.cdiv(weight.num_outputs, plan.bn), triton.cdiv(num_rows, bm)
    parts = 1 if scratch is None else plan.parts
    span = triton.cdiv(num_blocks, parts * plan.slices)
    columns = max(16, weight.quarter // 2) if plan.halves else weight.quarter
    partial, arrivals, row_sums = None, None, None
    if scratch is not None and parts > 1:
        tiles = grid[0] * grid[1]
        assert tiles <= len(scratch.arrivals)
        arrivals = scratch.arrivals
        partial = torch.empty(parts * tiles * bm * plan.bn, dtype=torch.float32, device=x.device)
    if weight.minimum is not None:
        row_sums = x.unflatten(1, (-1, weight.group)).sum(-1, dtype=torch.float32)
    packed_kernel[(grid[0], parts, grid[1])](
        x,
        weight.codes,
        weight.scale,
        weight.zero,
        weight.minimum,
        row_sums,
        bias,
        out,
        partial,
        arrivals,
        num_rows,
        weight.num_outputs,
        strips * ROWS,
        num_inputs,
        num_blocks,
        num_inputs // weight.group,
        x.stride(0),
        span,
        BM=bm,
        BN=plan.bn,
        SLICES=plan.slices,
        PARTS=parts,
        STAGES=plan.num_stages,
        ONCE=span == 1 and not plan.halves,
        EARLY=plan.early,
        PREFETCH=plan.prefetch,
        EVEN=num_inputs % (4 * weight.quarter) == 0 and span * parts * plan.slices == num_blocks,
        ASSEMBLY=assembly_of(x, weight),
        COLUMNS=columns,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        DEPENDENT=dependent,
        num_warps=plan.num_warps,
        launch_pdl=dependent,
        **format_of(weight),
    )


def assembly_of(x: Tensor, weight: Packed) -> str:
    """What unpacks a weight for rows of x's dtype; nothing in the interpreter."""
    if triton.knobs.runtime.interpret:
        return ""
    start = None if weight.zero is not None else weight.start
    return assembly(weight.bits, _SHORT[x.dtype], start, weight.kind)
