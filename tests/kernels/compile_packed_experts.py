"""As `compile_for_gpus.py`, for mixtures of experts of few bits.

python compile_packed_experts.py 90
"""

import sys

import torch
import triton
from compile_for_gpus import AbsentGpu, compile_only
from triton.runtime.jit import JITFunction

from pagedcore.execution.expert_ops import Clamp, Experts
from pagedcore.execution.quantized import Grouped
from pagedcore_kernels.expert_plans import ExpertPlan, choose_plan
from pagedcore_kernels.packed_codes import E2M1
from pagedcore_kernels.packed_experts import moe, pack_experts
from pagedcore_kernels.packed_layout import POWERS

SHARED = {80: 166_912, 89: 101_376, 90: 232_448}


def stack(rows, k, group, *, bits=4, scale_dtype=torch.float16, **more):
    scale = torch.empty(rows, k // group, dtype=torch.uint8 if scale_dtype == POWERS else None)
    scale = scale.view(POWERS) if scale_dtype == POWERS else scale.to(scale_dtype)
    return Grouped(torch.empty(rows, k * bits // 8, dtype=torch.uint8), scale, bits, **more)


def compile_moe(rows, plan, *, h, width, num_experts, num_chosen, clamp=None, room=232_448, **kind):
    x = torch.empty(rows, h, dtype=torch.bfloat16)
    experts = Experts(
        gate_up=stack(num_experts * 2 * width, h, **kind),
        down=stack(num_experts * h, width, **kind),
        clamp=clamp,
    )
    if clamp is not None:
        experts.gate_up_bias = x.new_empty(num_experts, 2 * width)
        experts.down_bias = x.new_empty(num_experts, h)
    packed = pack_experts(experts, x.dtype)
    chosen = torch.empty(rows, num_chosen, dtype=torch.int32)
    moe(x, torch.empty(rows, num_chosen), chosen, packed, plan, shared_memory=room)


def main(capability):
    sizes = dict(h=480, width=480, num_experts=4, num_chosen=2)
    float4 = dict(group=32, scale_dtype=POWERS, table=torch.tensor(E2M1))
    for per_expert in (1, 16, 100) if capability >= 90 else (100,):
        plan = choose_plan(per_expert * 4, 4)
        compile_moe(8, plan, **sizes, **float4, clamp=Clamp(1.7, 7.0), room=SHARED[capability])
    if capability < 90:
        return
    sizes = dict(h=512, width=256, num_experts=4, num_chosen=2)
    floats = dict(bits=8, scale_dtype=torch.float32, float8=True)
    compile_moe(8, choose_plan(4, 4), **sizes, group=128, **floats)
    compile_moe(8, ExpertPlan(64, 128, 4, 4), **sizes, group=128)


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    triton.runtime.driver.set_active(AbsentGpu(wanted))
    JITFunction.__getitem__ = compile_only
    main(wanted)
