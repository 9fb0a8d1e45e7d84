"""Compile what the Triton backend launches, for GPUs that need not be here; nothing runs.

    python compile_for_gpus.py 90    # compute capability 9.0; one line per kernel

The interpreter accepts what the compiler may not, such as a loop that it cannot pipeline. Prints
each kernel's name, its shared memory and its registers that did not fit, in bytes.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pagedcore.execution.expert_ops import Experts, Routing
from pagedcore.execution.kv_formats import Int8, fp8
from pagedcore.execution.lora_ops import AdapterStep, LoraWeights
from pagedcore.execution.ops import QKNorm, RopeTable
from pagedcore_kernels import backend
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.steps import make_step

SHARED_MEMORY = {80: 166_912, 90: 232_448}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class AbsentGpu:
    """A driver of triton that compiles for a device and has none."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def spilled_bytes(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


def compile_only(kernel, grid):
    def launch(*args, **kwargs):
        built = kernel.run(*args, grid=grid, warmup=True, **kwargs)
        spilled = spilled_bytes(built.asm["cubin"])
        print(kernel.__name__, built.metadata.shared, spilled, flush=True)

    return launch


def main():
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(AbsentGpu(capability))
    JITFunction.__getitem__ = compile_only
    backend._size_of = lambda device: (132, SHARED_MEMORY[capability])
    ops, weight = TritonOps("cpu"), torch.ones(128, dtype=torch.bfloat16)
    rope, norm = RopeTable(torch.ones(128, 128)), QKNorm(weight, weight, 1e-6)
    for kv_format in (None, Int8(), *([fp8()] if capability >= 89 else [])):
        step = make_step(
            [(1, 70), (40, 900)],
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            block_size=64,
            dtype=torch.bfloat16,
            kv_format=kv_format,
        )
        qkv = step.qkv.contiguous()
        ops.begin_step(step.batch)
        ops.rope_and_cache(qkv, step.num_heads, rope, norm, step.cache, step.batch)
        ops.attention(qkv, step.num_heads, 0.1, step.cache, step.batch)
        ops.copy_blocks(step.cache, torch.ones(1, 3, dtype=torch.int32))
    x = torch.ones(4, 128, dtype=torch.bfloat16)
    ops.rms_norm(x, weight, 1e-6)
    ops.add_rms_norm(x, x, weight, 1e-6)
    ops.silu_mul(x)
    for tanh in (False, True):
        ops.gelu_mul(x, tanh=tanh)
    ops.cap_scores(x, 30.0)
    gate_up, down = x.new_ones(8, 64, 128), x.new_ones(8, 128, 32)
    routing = Routing(num_chosen=2, normalize=True)
    ops.moe(x, *ops.route(x.new_ones(4, 8), routing), Experts(gate_up=gate_up, down=down))

    compile_latent_attention(ops)
    compile_adapters(ops)


def compile_adapters(ops):
    """For the layers of Llama-3.1-8B that are widest in and out, at two ranks."""
    slots = torch.ones(1100, dtype=torch.int32)
    for inputs, widths, rank in ((14336, (4096,), 16), (4096, (14336, 14336), 64)):
        x = torch.empty(1100, inputs, dtype=torch.bfloat16)
        weights = LoraWeights(
            a=x.new_empty(2, len(widths) * rank, inputs),
            b=x.new_empty(2, sum(widths), rank),
            widths=widths,
            part_widths=torch.tensor(widths, dtype=torch.int32),
            present=torch.ones(2, len(widths), dtype=torch.int32),
        )
        ops.add_lora(x.new_empty(1100, sum(widths)), x, weights, AdapterStep(slots, 64))


def compile_latent_attention(ops):
    """For the vectors of DeepSeek, with the heads of V2-Lite and of V3."""
    for num_heads in (16, 128):
        step = make_step(
            [(1, 70), (40, 900)],
            num_heads=num_heads,
            num_kv_heads=1,
            head_dim=576,
            block_size=64,
            dtype=torch.bfloat16,
        )
        cache = replace(step.cache, value=step.cache.key)
        query = step.qkv.reshape(41, -1, 576)[:, :num_heads].contiguous()
        ops.begin_step(step.batch)
        rope, weight = RopeTable(torch.ones(128, 64), interleaved=True), torch.ones(512)
        turned, latent = query[..., 512:], query[:, 0]
        ops.latent_to_cache(query, turned, latent, rope, weight, 1e-6, cache, step.batch)
        ops.latent_attention(query, 512, 0.1, cache, step.batch)


if __name__ == "__main__":
    main()
