"""Each kernel against the plain operation in float32, on odd shapes.

T tokens   S sequences   h hidden size   F width   E experts   V vocabulary
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pagedcore.execution.expert_ops import Experts, Routing
from pagedcore.execution.kernel_bench import Check
from pagedcore.execution.kv_formats import Int8, as_is, fp8
from pagedcore.execution.ops import QKNorm, RopeTable
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.latent_checks import check_latent, check_sinks
from pagedcore_kernels.bench.steps import PagedStep, make_step
from pagedcore_kernels.fallback import PlainOps

LIMITS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest relative error: the rounding of the type, with room for that of probabilities."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def attention_error(step: PagedStep, soft_cap: float | None = None) -> float:
    """Of `TritonOps.attention` to the plain one in float32 on the same values."""
    ops, plain = TritonOps(str(step.qkv.device)), PlainOps(str(step.qkv.device))
    scale = step.cache.spec.head_dim**-0.5
    ops.begin_step(step.batch)
    got = ops.attention(step.qkv, step.num_heads, scale, step.cache, step.batch, soft_cap)
    want = plain.attention(
        step.qkv.float(), step.num_heads, scale, step.cache, step.batch, soft_cap
    )
    return relative_error(got, want)


def check_kernels(device: str, *, small: bool = False) -> Iterator[Check]:
    """Run every check; `small` is for triton's interpreter, which multiplies no bfloat16."""
    kinds = [torch.float16] if small else [torch.bfloat16, torch.float16, torch.float32]
    for dtype in kinds:
        yield from _check_attention(device, dtype, small)
        yield from _check_rows(device, dtype, small)
        yield from _check_cache(device, dtype)
        yield _check_moe(device, dtype, small)
        yield from check_latent(device, dtype, LIMITS[dtype], small=small)
        yield from check_sinks(device, dtype, LIMITS[dtype], small=small)


def _check_attention(device: str, dtype: torch.dtype, small: bool) -> Iterator[Check]:
    lengths = [(1, 1), (1, 64), (1, 65), (1, 700), (1, 2), (5, 5), (130, 130), (33, 600)]
    if small:
        lengths = [(1, 1), (1, 40), (5, 5), (33, 60)]
    kind = str(dtype).removeprefix("torch.")
    for head_dim in [64] if small else [64, 80, 96, 128, 192, 256]:
        for heads in [(4, 2)] if small else [(4, 4), (16, 8), (6, 2), (32, 8), (32, 4)]:
            if head_dim != 128 and heads != (16, 8) and not small:
                continue
            step = make_step(
                lengths, num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim,
                block_size=64, dtype=dtype, num_padding=2, device=device,
            )  # fmt: skip
            name = f"attention {kind} D {head_dim} heads {heads[0]}/{heads[1]}"
            yield Check(name, attention_error(step), LIMITS[dtype])
    for block_size, window, soft_cap in ((16, None, None), (128, 100, None), (64, 33, 20.0)):
        step = make_step(
            lengths, num_heads=8, num_kv_heads=2, block_size=block_size, window=window,
            dtype=dtype, device=device,
        )  # fmt: skip
        name = f"attention {kind} B {block_size} window {window} soft cap {soft_cap}"
        yield Check(name, attention_error(step, soft_cap), LIMITS[dtype])
    for kv_format in (fp8(), Int8()):
        if dtype == torch.float32 or (small and kv_format.scale_dtype is None):
            continue
        step = make_step(
            lengths, num_heads=16, num_kv_heads=8, head_dim=128, block_size=64, dtype=dtype,
            kv_format=kv_format, device=device,
        )  # fmt: skip
        name = f"attention {kind}, keys and values {kv_format.name}"
        yield Check(name, attention_error(step), LIMITS[dtype])
    if not small and dtype != torch.float32:
        step = make_step(
            [(1, 4000), (24, 3000), (40, 40)], num_heads=32, num_kv_heads=8, head_dim=128,
            block_size=64, dtype=dtype, device=device,
        )  # fmt: skip
        yield Check(f"attention {kind}, keys in parts", attention_error(step), LIMITS[dtype])


def _check_rows(device: str, dtype: torch.dtype, small: bool) -> Iterator[Check]:
    ops, plain = TritonOps(device), PlainOps(device)
    kind = str(dtype).removeprefix("torch.")
    for h in [72] if small else [72, 1024, 4096]:
        x, residual = (torch.randn(37, h, device=device, dtype=dtype) for _ in range(2))
        weight = torch.rand(h, device=device, dtype=dtype) + 0.5
        want = plain.rms_norm(x.float(), weight.float(), 1e-6)
        error = relative_error(ops.rms_norm(x, weight, 1e-6), want)
        yield Check(f"rms_norm {kind} h {h}", error, LIMITS[dtype])
        total = x + residual
        want = plain.rms_norm(total.float(), weight.float(), 1e-6)
        got, sums = ops.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
        yield Check(f"add_rms_norm {kind} h {h}", relative_error(got, want), LIMITS[dtype])
        yield Check(f"add_rms_norm {kind} h {h}, the sum", relative_error(sums, total), 0.0)
        gate_up = torch.randn(37, 2 * h, device=device, dtype=dtype)
        error = relative_error(ops.silu_mul(gate_up), plain.silu_mul(gate_up.float()))
        yield Check(f"silu_mul {kind} F {h}", error, LIMITS[dtype])
        for tanh in (False, True):
            want = plain.gelu_mul(gate_up.float(), tanh=tanh)
            error = relative_error(ops.gelu_mul(gate_up, tanh=tanh), want)
            name = f"gelu_mul {kind} F {h}{', tanh' if tanh else ''}"
            yield Check(name, error, LIMITS[dtype])
        error = relative_error(
            ops.cap_scores(gate_up.clone(), 2.0), plain.cap_scores(gate_up.clone(), 2.0)
        )
        yield Check(f"cap_scores {kind} V {2 * h}", error, LIMITS[torch.float32])


def _check_cache(device: str, dtype: torch.dtype) -> Iterator[Check]:
    ops, plain = TritonOps(device), PlainOps(device)
    kind = str(dtype).removeprefix("torch.")
    for head_dim, rotated, interleaved in ((128, 128, False), (80, 32, False), (64, 64, True)):
        step = make_step([(1, 70), (40, 100)], head_dim=head_dim, dtype=dtype, device=device)
        rope = RopeTable(torch.randn(128, rotated, device=device), interleaved)
        weights = torch.rand(2, head_dim, device=device, dtype=dtype) + 0.5
        got, want = _rope(ops, step, rope, weights), _rope(plain, step, rope, weights)
        for part, a, b in zip(("qkv", "keys", "values"), got, want, strict=True):
            name = f"rope_and_cache {kind} D {head_dim} rotated {rotated}, {part}"
            yield Check(name, relative_error(a, b), LIMITS[dtype])
    step = make_step([(1, 70), (40, 100)], dtype=dtype, device=device)
    copies = torch.tensor([[1, 2, 7], [3, 4, 16]], dtype=torch.int32, device=device)
    caches = [
        replace(step.cache, key=step.cache.key.clone(), value=step.cache.value.clone())
        for _ in range(2)
    ]
    ops.copy_blocks(caches[0], copies)
    plain.copy_blocks(caches[1], copies)
    error = relative_error(caches[0].key.nan_to_num(), caches[1].key.nan_to_num())
    yield Check(f"copy_blocks {kind}", error, 0.0)


def _rope(
    ops: TritonOps | PlainOps, step: PagedStep, rope: RopeTable, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What is left in qkv, keys and values; the plain operation works in float32."""
    dtype = torch.float32 if isinstance(ops, PlainOps) else step.qkv.dtype
    spec, num_blocks = step.cache.spec, len(step.cache.key)
    block_size, device = step.cache.block_size, step.qkv.device
    cache = ops.new_cache(spec, 1, num_blocks, block_size, as_is(dtype), device)
    if isinstance(ops, PlainOps):
        shape = step.cache.key.shape
        cache = replace(cache, key=torch.zeros(shape, device=device))
        cache = replace(cache, value=torch.zeros(shape, device=device))
    qkv = step.qkv.to(dtype).clone()
    norm = QKNorm(weights[0].to(dtype), weights[1].to(dtype), 1e-6)
    ops.rope_and_cache(qkv, step.num_heads, rope, norm, cache, step.batch)
    return qkv, cache.key, cache.value


def _check_moe(device: str, dtype: torch.dtype, small: bool) -> Check:
    tokens, h, width, experts, chosen = (9, 64, 48, 8, 2) if small else (300, 512, 384, 32, 4)
    ops, plain = TritonOps(device), PlainOps(device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, scores = draw(tokens, h), draw(tokens, experts)
    gate_up, down = draw(experts, 2 * width, h) * h**-0.5, draw(experts, h, width) * width**-0.5
    routing = Routing(num_chosen=chosen, normalize=True)
    got = ops.moe(x, *ops.route(scores, routing), Experts(gate_up=gate_up, down=down))
    exact = Experts(gate_up=gate_up.float(), down=down.float())
    want = plain.moe(x.float(), *plain.route(scores.float(), routing), exact)
    name = f"moe {str(dtype).removeprefix('torch.')} T {tokens} E {experts}"
    return Check(name, relative_error(got, want), 2 * LIMITS[dtype])
