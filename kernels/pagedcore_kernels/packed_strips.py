"""Multiply few rows with a weight of 4 bits that streams through registers.

    M rows, at most 16   N outputs   K inputs   B blocks of 4 * Q inputs

    x         [M, K]      K contiguous, M may have any stride; bfloat16 or float16
    weight    [N, K]      as `packed_layout` lays it out, groups of 32 to 256 inputs, without minima
    bias      [N]         contiguous, same dtype as x; optional
    partial   [P, N, BM]  float32 scratch, where there are P > 1 parts of the inputs
    arrivals  [runs of strips]   int32, zero before and after; where P > 1
    out       [M, N]      contiguous, same dtype as x

Each warp keeps its slice of x in registers, for good, and reads strips of 16 outputs past it: a
strip's words go from memory to the registers that tensor cores multiply from, and the next strip's
are asked for as soon as these are unpacked. Warps have slices of their own, whose sums are added
through shared memory; parts of the inputs belong to programs, of which the last to arrive adds them
in their order. So results are the same in every run.

Codes are not made weights one by one: a code becomes the lowest bits of 128 (bfloat16) or 1,024
(float16), and that number plus the zero, times the sum of x over the group, is subtracted from the
group's sum. Products are exact and sums float32: what is lost to the larger terms is near 2 ** -15
of the result, which is rounded to 8 or 11 bits at the end.

Where nothing here fits, `choose` says so, and `packed_linear` multiplies.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pagedcore_kernels.packed_codes import UNITS, codes_assembly
from pagedcore_kernels.packed_layout import POWERS, ROWS, Packed
from pagedcore_kernels.packed_strips_kernel import strips_kernel
from pagedcore_kernels.packed_widen import TYPES
from pagedcore_kernels.small_linear import Scratch

MAX_ROWS = 16

PROCESSORS = 132
"""Of a Hopper GPU, on which the plans were measured."""

_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True, slots=True)
class StripPlan:
    """Programs have `slices` warps, and a warp `blocks` blocks of inputs, times `parts`: all.

    A program goes through `steps` times `strips` strips, and joins the sums of slices at each step.
    """

    slices: int
    blocks: int
    parts: int
    strips: int
    steps: int
    max_registers: int | None = None
    """Of a thread, where two programs are to share a processor."""


def can_run(device: torch.device) -> bool:
    """Whether it is a Hopper GPU, whose registers and memory plans are cut for.

    There is no interpreter for Gluon.
    """
    return (
        device.type == "cuda"
        and not triton.knobs.runtime.interpret
        and torch.cuda.get_device_capability(device)[0] == 9
    )


def choose(num_rows: int, weight: Packed, dtype: torch.dtype) -> StripPlan | None:
    """The plan for so many rows of `dtype`; None where `packed_linear` is faster, or alone can."""
    num_blocks, block = weight.codes.shape[1], 4 * weight.quarter
    if not (
        0 < num_rows <= MAX_ROWS
        and dtype in _NAMES
        and weight.bits == 4
        and weight.kind is None
        and weight.minimum is None
        and weight.quarter in (32, 64)
        and weight.quarter <= weight.size <= block
        and weight.num_inputs == num_blocks * block
        and weight.scale_dtype != POWERS
    ):
        return None
    is_few = num_rows <= 8
    blocks = (256 if is_few else 512) // block  # of a warp: 8 warps have registers for more
    slices = next((count for count in (16, 8, 4) if num_blocks == count * blocks), 8)
    parts, rest = divmod(num_blocks, slices * blocks)
    if rest or not 1 <= parts <= 16 or (parts > 1 and not is_few):
        return None
    two_fit = slices == 8 and is_few
    num_strips, programs = weight.codes.shape[0], PROCESSORS * (2 if two_fit else 1)
    share = triton.cdiv(num_strips * parts, programs)
    strips = _strips(share, slices) if is_few else 1
    if num_strips % strips:
        strips = 1
    steps = triton.cdiv(share, strips)
    return StripPlan(slices, blocks, parts, strips, steps, 128 if two_fit else None)


def _strips(share: int, slices: int) -> int:
    """Strips of a step, for a program that has so many in all."""
    if share <= 3:
        return share
    return 2 if slices == 16 else 1


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    scratch: Scratch,
    plan: StripPlan,
    *,
    dependent: bool = False,
) -> Tensor:
    """x [M, K] times a packed weight [N, K], plus bias [N]: [M, N] in x's dtype.

    The columns of x are in the weight's order. A `dependent` kernel may start while the one before
    it ends, and waits for it before it reads anything but the weight.
    """
    num_rows, num_outputs = len(x), weight.num_outputs
    num_strips, num_blocks = weight.codes.shape[:2]
    assert x.shape[1] == weight.num_inputs and x.stride(1) == 1 and 0 < num_rows <= MAX_ROWS
    assert plan.slices * plan.blocks * plan.parts == num_blocks and num_strips % plan.strips == 0
    runs = triton.cdiv(num_strips, plan.strips * plan.steps)
    bm = 8 if num_rows <= 8 else 16
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    partial, arrivals = None, None
    if plan.parts > 1:
        assert runs <= len(scratch.arrivals)
        arrivals = scratch.arrivals
        size = plan.parts * num_strips * ROWS * bm
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    name = _NAMES[x.dtype]
    start = 0 if weight.zero is not None else weight.start
    strips_kernel[(runs, plan.parts)](
        x,
        weight.codes.view(torch.int32),
        weight.scale,
        weight.zero,
        bias,
        out,
        partial,
        arrivals,
        num_rows,
        num_outputs,
        num_strips * ROWS,
        num_blocks,
        x.stride(0),
        plan.steps,
        BM=bm,
        STRIPS=plan.strips,
        SLICES=plan.slices,
        BLOCKS=plan.blocks,
        PARTS=plan.parts,
        Q=weight.quarter,
        GROUP=weight.size,
        HAS_ZEROS=weight.zero is not None,
        OFFSET=-float(UNITS[name] + start),
        SCALE_TYPE=TYPES[weight.scale_dtype],
        ASSEMBLY=codes_assembly(name),
        HAS_BIAS=bias is not None,
        DEPENDENT=dependent,
        num_warps=plan.slices,
        maxnreg=plan.max_registers,
        launch_pdl=dependent,
    )
    return out
