"""Compile kernels for an H100 where there is no GPU: a launch compiles, and runs nothing.

    python compile_for_gpu.py

Triton's interpreter takes types and shapes that its compiler refuses. Prints a line for each
kernel that was compiled, with the shared memory that it takes.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from pagedcore.execution.ops import SamplingTensors
from pagedcore_kernels import fp8
from pagedcore_kernels.sampling import sample
from pagedcore_kernels.small_linear import Scratch, linear
from pagedcore_kernels.small_linear_plans import DotPlan

H100 = GPUTarget("cuda", 90, 32)
MOST_SHARED_BYTES = 227 * 1024

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compile_only(kernel, *args, grid, warmup, **settings):
    """In place of a launch: the same types, constants and alignments."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {name: settings.pop(name) for name in kernel.arg_names if name in settings}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    made = compile(source, target=H100, options=settings)
    assert made.metadata.shared <= MOST_SHARED_BYTES, (kernel.__name__, made.metadata.shared)
    print(kernel.__name__, made.metadata.shared, flush=True)


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


def sampling():
    for dtype, vocab_size in ((torch.bfloat16, 151936), (torch.float32, 50257), (torch.float16, 1)):
        logits = torch.empty(2, vocab_size, dtype=dtype)
        for greedy, filtered in ((True, False), (False, False), (False, True)):
            sample(logits, parameters(2, greedy=greedy, filtered=filtered))


def products():
    scratch = Scratch(torch.device("cpu"))
    for rows, dependent in ((1, True), (8, True), (64, False), (300, False)):
        x = torch.empty(rows, 4096, dtype=torch.bfloat16)
        bias = torch.empty(6144, dtype=torch.bfloat16)
        linear(x, x.new_empty(6144, 4096), bias, dependent=dependent)
        for groups in (1, 32):
            narrow = torch.empty(6144, 4096, dtype=torch.float8_e4m3fn)
            linear(x, narrow, scale=torch.empty(6144, groups), dependent=dependent)
    x = torch.empty(16, 2048, dtype=torch.float16)
    linear(x, x.new_empty(1024, 2048), None, scratch, plan=DotPlan(16, 64, 4, 4, 4, 3))
    linear(x[:, :1000], x.new_empty(1024, 1000), None, scratch, plan=DotPlan(8, 128, 1, 2, 4, 3))


def rounding():
    for dtype, width in ((torch.bfloat16, 4096), (torch.float16, 1000), (torch.float32, 14336)):
        x = torch.empty(3, width, dtype=dtype)
        fp8.quantize(x)
        fp8.add_rms_norm(x, x.clone(), x.new_empty(width), 1e-5)
        fp8.silu_mul(x.new_empty(3, 2 * width))


if __name__ == "__main__":
    JITFunction.run = compile_only
    sampling()
    products()
    rounding()
