"""As `compile_for_gpus.py`, for the kernels that multiply few rows, round to 8 bits, and draw.

python compile_products_and_draws.py 90
"""

import sys

import torch
import triton
from compile_for_gpus import AbsentGpu, compile_only
from triton.runtime.jit import JITFunction

from pagedcore.execution.ops import SamplingTensors
from pagedcore.execution.quantized import Grouped
from pagedcore_kernels import block_fp8, fp8, int8, packed_linear, packed_strips, packed_widen
from pagedcore_kernels.packed_layout import pack
from pagedcore_kernels.packed_plans import PackedPlan
from pagedcore_kernels.sampling import sample
from pagedcore_kernels.small_linear import Scratch, linear
from pagedcore_kernels.small_linear_plans import DotPlan


def parameters(num, *, greedy, filtered):
    floats = [torch.ones(num) for _ in range(4)]
    return SamplingTensors(
        temperature=floats[0],
        min_p=floats[1],
        top_k=torch.zeros(num, dtype=torch.int32),
        top_p=floats[2],
        uniform=floats[3],
        all_greedy=greedy,
        any_filter=filtered,
    )


def sampling(*, is_hopper):
    cases = [(torch.bfloat16, 151936), (torch.float32, 50257), (torch.float16, 1)]
    for dtype, vocab_size in cases if is_hopper else cases[:1]:  # the types make no difference
        logits = torch.empty(2, vocab_size, dtype=dtype)
        for greedy, filtered in ((True, False), (False, False), (False, True)):
            sample(logits, parameters(2, greedy=greedy, filtered=filtered))


def products(*, is_hopper):
    scratch = Scratch(torch.device("cpu"))
    for rows in (1, 8, 64, 300):
        dependent = is_hopper and rows < 64
        x = torch.empty(rows, 4096, dtype=torch.bfloat16)
        bias = torch.empty(6144, dtype=torch.bfloat16)
        linear(x, x.new_empty(6144, 4096), bias, dependent=dependent)
        for groups in (1, 32) if is_hopper else ():
            narrow = torch.empty(6144, 4096, dtype=torch.float8_e4m3fn)
            linear(x, narrow, scale=torch.empty(6144, groups), dependent=dependent)
    x = torch.empty(16, 2048, dtype=torch.float16)
    linear(x, x.new_empty(1024, 2048), None, scratch, plan=DotPlan(16, 64, 4, 4, 4, 3))
    linear(x[:, :1000], x.new_empty(1024, 1000), None, scratch, plan=DotPlan(8, 128, 1, 2, 4, 3))


def packed(*, is_hopper):
    scratch, x = Scratch(torch.device("cpu")), torch.empty(8, 1024, dtype=torch.bfloat16)
    codes, scale = torch.empty(256, 512, dtype=torch.uint8), torch.empty(256, 8).half()
    zeros = pack(Grouped(codes, scale, 4, zero=torch.empty(256, 8, dtype=torch.uint8)))
    packed_linear.linear(x, zeros, None, scratch, plan=PackedPlan(128, 1, 4))
    packed_widen.widen(zeros, 0, 64, torch.bfloat16)
    int8.linear(x, torch.empty(256, 1024, dtype=torch.int8), torch.empty(256, 1))
    if not is_hopper:
        return
    plain = pack(Grouped(codes, scale, 4))
    plans = [(8, PackedPlan(32, 4, 1)), (64, PackedPlan(64, 1, 2)), (1, PackedPlan(32, 8, 1, 8))]
    for rows, plan in plans:
        several = x.new_empty(rows, 1024)
        packed_linear.linear(several, plain, None, scratch, plan=plan, dependent=True)
    table = pack(Grouped(codes, scale, 4, table=torch.rand(16)))
    minima = pack(Grouped(codes, x.new_empty(256, 32), 4, minimum=torch.empty(256, 32)))
    by_eight = pack(Grouped(x.new_empty(256, 1024, dtype=torch.uint8), scale, 8))
    for rows, weight in ((x, table), (x, minima), (x, by_eight), (x.half(), by_eight)):
        packed_linear.linear(rows, weight, None, scratch, plan=PackedPlan(64, 1, 8))


def strips():
    """Packed weights that stream: the shapes of Llama-3.1-8B, and a format of each kind."""
    scratch = Scratch(torch.device("cpu"))
    cases = [
        (8, 28672, 4096, 128, torch.float16, False, torch.bfloat16),
        (8, 4096, 14336, 128, torch.bfloat16, True, torch.bfloat16),
        (16, 6144, 4096, 128, torch.float16, False, torch.bfloat16),
        (16, 6144, 4096, 128, torch.float16, True, torch.float16),
        (16, 28672, 4096, 128, torch.float16, False, torch.bfloat16),
        (5, 272, 2048, 64, torch.float32, True, torch.float16),
        (1, 272, 1024, 32, torch.float32, False, torch.bfloat16),
    ]
    for m, n, k, group, scale_dtype, has_zeros, dtype in cases:
        groups = (n, k // group)
        zero = torch.empty(groups, dtype=torch.uint8) if has_zeros else None
        codes, scale = (
            torch.empty(n, k // 2, dtype=torch.uint8),
            torch.empty(groups).to(scale_dtype),
        )
        weight = pack(Grouped(codes, scale, 4, zero=zero))
        plan = packed_strips.choose(m, weight, dtype)
        x, bias = torch.empty(m, k, dtype=dtype), torch.empty(n, dtype=dtype)
        packed_strips.linear(x, weight, bias, scratch, plan, dependent=True)


def blocks():
    x, shares = torch.empty(8, 1024, dtype=torch.bfloat16), torch.empty(256, 8)
    values, scale = block_fp8.quantize_groups(x, dependent=True)
    weight, scratch = torch.empty(256, 1024, dtype=values.dtype), Scratch(torch.device("cpu"))
    block_fp8.block_linear(values, scale, weight, shares, None, x.dtype, scratch, dependent=True)


def rounding():
    for dtype, width in ((torch.bfloat16, 4096), (torch.float16, 1000), (torch.float32, 14336)):
        x = torch.empty(3, width, dtype=dtype)
        fp8.quantize(x)
        fp8.add_rms_norm(x, x.clone(), x.new_empty(width), 1e-5)
        fp8.silu_mul(x.new_empty(3, 2 * width))


if __name__ == "__main__":
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(AbsentGpu(capability))
    JITFunction.__getitem__ = compile_only
    sampling(is_hopper=capability >= 90)
    products(is_hopper=capability >= 90)
    packed(is_hopper=capability >= 90)
    if capability >= 90:  # 8 bits came with 8.9
        rounding()
        blocks()
        strips()
