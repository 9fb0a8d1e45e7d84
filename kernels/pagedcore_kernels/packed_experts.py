"""A mixture of experts whose matrices have few bits: read packed, unpacked in registers.

    T tokens     h hidden size     E experts     C experts chosen per token     F expert width
    A = T * C assignments          N outputs and K inputs of one expert's matrix

    x             [T, h]    contiguous; bfloat16, float16 or float32
    weights       [T, C]    float32, contiguous
    chosen        [T, C]    int32, contiguous
    gate_up       [E * N, K = h]   N = 2F, rounded up to whole strips; gates and partners in turn
    down          [E * N, K = F]   N = h, rounded up likewise
    biases        [E, 2F], in turn likewise, and [E, h], contiguous, or none
    act           [A, F]    scratch in x's dtype, and so is part [A, h]
    out           [T, h]    x's dtype

A matrix of all experts is one weight as `packed_layout` has it, in strips of 16 outputs, of which
each expert has whole ones. The kernels are those of `moe`, but for the two products: here the
weight is the left factor, so that eight assignments are enough for a tile, and codes become numbers
in the registers from which tensor cores read (see `packed_codes`). Since gates and their partners
lie next to each other, one product computes both, and the activation is applied to its sums.

Scales multiply the sums of their group, in float32. Of many rows that takes longer than multiplying
the weights, so scales that are powers of two are multiplied there, where it is exact.

Traffic: the packed bytes of every touched expert once for each tile of it. In decode they are all
of it: of GPT-OSS-20B (4 of 32 experts, h = F = 2880, 17 bytes for 32 numbers), a token reads
4 * 3 * 2880 * 2880 * 17 / 32 bytes = 52.9 MB in each of 24 layers, and 2.2 % more for the padding
of K to whole blocks. `TorchOps.moe` is the specification in plain torch.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from pagedcore.execution.expert_ops import Clamp, Experts, Matrices
from pagedcore.execution.quantized import Grouped, rows_of
from pagedcore.execution.torch_experts import OneExpert
from pagedcore.execution.torch_quantized import widen_grouped
from pagedcore_kernels.expert_plans import SHARED_MEMORY, ExpertPlan, choose_plan, fit
from pagedcore_kernels.expert_tiles import Assignments, combine, sort_assignments
from pagedcore_kernels.packed_experts_kernel import packed_experts_kernel
from pagedcore_kernels.packed_layout import POWERS, ROWS, Packed, pack, unpack
from pagedcore_kernels.packed_linear import assembly_of
from pagedcore_kernels.packed_widen import format_of

WIDE_BM = 16
"""Assignments of a tile in float32, which is multiplied without tensor cores."""


@dataclass(slots=True, kw_only=True)
class PackedExperts(Experts):
    """Experts as the kernel reads them; see the head of this file."""

    num_experts: int
    hidden_size: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, h, F)."""
        return self.num_experts, self.hidden_size, self.width


def pack_experts(experts: Experts, dtype: torch.dtype) -> Experts:
    """Experts for `moe`; in `dtype`, as tensors, where their groups have no layout."""
    gate_up, down = experts.gate_up, experts.down
    if not isinstance(gate_up, Grouped) or not isinstance(down, Grouped):
        return experts
    num_experts, h, f = experts.shape
    in_turn = torch.arange(2 * f, device=gate_up.codes.device).view(2, f).t().flatten()
    packed = (
        _pack_stack(gate_up, num_experts, in_turn),
        _pack_stack(down, num_experts, torch.arange(h, device=in_turn.device)),
    )
    if packed[0] is None or packed[1] is None:
        return replace(
            experts,
            gate_up=widen_grouped(gate_up, dtype).view(num_experts, 2 * f, h),
            down=widen_grouped(down, dtype).view(num_experts, h, f),
        )
    bias = experts.gate_up_bias
    return PackedExperts(
        gate_up=packed[0],
        down=packed[1],
        gate_up_bias=None if bias is None else bias[:, in_turn].contiguous(),
        down_bias=experts.down_bias,
        clamp=experts.clamp,
        num_experts=num_experts,
        hidden_size=h,
        width=f,
    )


def _pack_stack(stack: Grouped, num_experts: int, order: Tensor) -> Packed | None:
    """A stack whose experts have their rows in another order, and whole strips."""
    missing = -len(order) % ROWS

    def arranged(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        is_power = values.dtype == POWERS
        rows = (values.view(torch.uint8) if is_power else values).unflatten(0, (num_experts, -1))
        rows = functional.pad(rows[:, order], (0, 0, 0, missing)).flatten(0, 1)
        return rows.view(POWERS) if is_power else rows

    codes, scale = arranged(stack.codes), arranged(stack.scale)
    assert codes is not None
    assert scale is not None
    quarter = 16 if stack.group == 16 else 32
    whole = replace(
        stack,
        codes=codes,
        scale=scale,
        zero=arranged(stack.zero),
        minimum=arranged(stack.minimum),
    )
    has_layout = (
        stack.group >= stack.shape[1] or stack.group % 128 == 0 or stack.group in (16, 32, 64)
    )
    return pack(whole, quarter) if has_layout else None


def unpack_expert(experts: PackedExperts, e: int, dtype: torch.dtype) -> OneExpert:
    """What expert e multiplies with, in `dtype`: what plain torch reads, where no kernel runs."""
    gate_up, bias = _take_expert(experts.gate_up, e, experts.num_experts), experts.gate_up_bias
    down = _take_expert(experts.down, e, experts.num_experts)
    gates_first = torch.arange(2 * experts.width, device=gate_up.codes.device).view(-1, 2).t()
    gates_first = gates_first.flatten()
    return OneExpert(
        widen_grouped(gate_up, dtype)[gates_first],
        None if bias is None else bias[e, gates_first],
        widen_grouped(rows_of(down, slice(experts.hidden_size)), dtype),
        None if experts.down_bias is None else experts.down_bias[e],
    )


def _take_expert(stack: Matrices, e: int, num_experts: int) -> Grouped:
    assert isinstance(stack, Packed)
    rows = stack.num_outputs // num_experts
    own = slice(e * rows, (e + 1) * rows)

    def columns(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, own]

    scale = columns(stack.scale)
    assert scale is not None
    return unpack(
        replace(
            stack,
            codes=stack.codes[own.start // ROWS : own.stop // ROWS],
            scale=scale,
            zero=columns(stack.zero),
            minimum=columns(stack.minimum),
            num_outputs=rows,
        )
    )


def moe(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    experts: PackedExperts,
    plan: ExpertPlan | None = None,
    *,
    shared_memory: int = SHARED_MEMORY,
) -> Tensor:
    """Mix the chosen experts of each token; see the head of this file for the shapes."""
    num_experts, h, f = experts.shape
    num_chosen, device = chosen.shape[1], x.device
    total = len(x) * num_chosen
    assert weights.is_contiguous() and x.is_contiguous()
    assert isinstance(experts.gate_up, Packed)
    has_powers = experts.gate_up.scale_dtype == POWERS
    plan = plan or choose_plan(total, num_experts, has_powers)
    if x.dtype == torch.float32 and plan.bm > WIDE_BM:
        plan = ExpertPlan(WIDE_BM, 32, 4, 2)
    for stack in (experts.gate_up, experts.down):
        assert isinstance(stack, Packed)
        copied = 3 if stack.zero is None else 5  # zeros are copied by the compiler
        of_weight = stack.block_bytes * copied // 3
        plan = fit(plan, of_weight, 4 * stack.quarter * x.itemsize, shared_memory)
    tiles = sort_assignments(chosen, num_experts)
    act = torch.empty(total, f, dtype=x.dtype, device=device)
    part = torch.empty(total, h, dtype=x.dtype, device=device)
    out = torch.empty_like(x)
    _multiply(
        x,
        experts.gate_up,
        experts.gate_up_bias,
        act,
        tiles,
        plan,
        num_outputs=2 * f,
        CHOSEN=num_chosen,
        GATED=True,
        clamp=experts.clamp,
    )
    _multiply(
        act, experts.down, experts.down_bias, part, tiles, plan, num_outputs=h, weights=weights
    )
    combine(part, out, num_chosen)
    return out


def _multiply(
    x: Tensor,
    stack: Matrices,
    bias: Tensor | None,
    out: Tensor,
    tiles: Assignments,
    plan: ExpertPlan,
    *,
    num_outputs: int,
    weights: Tensor | None = None,
    clamp: Clamp | None = None,
    CHOSEN: int = 1,
    GATED: bool = False,
) -> None:
    assert isinstance(stack, Packed)
    num_experts = len(tiles.counts)
    strips, num_blocks = stack.codes.shape[:2]
    num_inputs = stack.num_inputs
    grid = tiles.most_tiles(plan.bm) * triton.cdiv(num_outputs, plan.bn)
    constants: dict[str, Any] = format_of(stack)
    packed_experts_kernel[(grid,)](
        x,
        stack.codes,
        stack.scale,
        stack.zero,
        stack.minimum,
        bias,
        weights,
        tiles.order,
        tiles.starts,
        tiles.counts,
        out,
        num_experts,
        num_outputs,
        strips // num_experts,
        num_inputs,
        num_blocks,
        1.0 if clamp is None else clamp.alpha,
        0.0 if clamp is None else clamp.limit,
        CHOSEN=CHOSEN,
        BM=plan.bm,
        BN=plan.bn,
        BLOCK_E=triton.next_power_of_2(num_experts),
        STAGES=plan.num_stages,
        EVEN=num_inputs % (4 * stack.quarter) == 0,
        SCALED=plan.scaled and stack.scale_dtype == POWERS and x.dtype != torch.float16,
        GATED=GATED,
        HAS_CLAMP=clamp is not None,
        HAS_BIAS=bias is not None,
        HAS_WEIGHTS=weights is not None,
        ASSEMBLY=assembly_of(x, stack),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=plan.num_warps,
        **constants,
    )
