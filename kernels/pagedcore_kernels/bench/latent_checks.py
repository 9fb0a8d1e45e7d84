"""Latent attention (MLA) and heads with sinks against the plain operations in float32.

T tokens   H query heads   D elements of a latent vector
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.kernel_bench import Check
from pagedcore.execution.ops import RopeTable
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.steps import make_step
from pagedcore_kernels.fallback import PlainOps


def check_latent(device: str, dtype: torch.dtype, limit: float, *, small: bool) -> Iterator[Check]:
    """Decode, extend, and what writes the cache, at the sizes of DeepSeek unless `small`."""
    lengths = [(1, 1), (1, 64), (1, 700), (5, 5), (33, 600), (130, 130)]
    sizes = [(16, 512, 64), (128, 512, 64)]
    if small:
        lengths, sizes = [(1, 1), (1, 40), (3, 20)], [(4, 32, 16)]
    ops, plain = TritonOps(device), PlainOps(device)
    kind = str(dtype).removeprefix("torch.")
    for num_heads, num_values, turned in sizes:
        size = num_values + turned
        step = make_step(
            lengths, num_heads=num_heads, num_kv_heads=1, head_dim=size, block_size=64,
            dtype=dtype, num_padding=2, device=device,
        )  # fmt: skip
        spec = CacheSpec(num_kv_heads=1, head_dim=size, latent=True)
        cache = replace(step.cache, spec=spec, value=step.cache.key)
        exact = replace(cache, key=cache.key.float(), value=cache.key.float())
        query = step.qkv.reshape(len(step.qkv), -1, size)[:, :num_heads].contiguous()
        scale, batch = size**-0.5, step.batch
        ops.begin_step(batch)
        got = ops.latent_attention(query, num_values, scale, cache, batch)
        want = plain.latent_attention(query.float(), num_values, scale, exact, batch)
        name = f"latent_attention {kind} D {size} heads {num_heads}"
        yield Check(name, _error(got, want), limit)

        rope = RopeTable(torch.randn(1024, turned, device=device), interleaved=True)
        weight = torch.rand(num_values, device=device, dtype=dtype) + 0.5
        unturned, latent = query[..., num_values:].clone(), step.qkv[:, :size]
        written = []
        for backend in (ops, plain):
            target = replace(cache, key=torch.zeros_like(cache.key))
            backend.begin_step(batch)
            backend.latent_to_cache(query, unturned, latent, rope, weight, 1e-6, target, batch)
            written.append((query[..., num_values:].clone(), target.key[1:]))
        for part, a, b in zip(("queries", "vectors"), *written, strict=True):
            yield Check(f"latent_to_cache {kind} D {size}, {part}", _error(a, b), limit)


def check_sinks(device: str, dtype: torch.dtype, limit: float, *, small: bool) -> Iterator[Check]:
    """Heads with a score that has no value, at the size of GPT-OSS unless `small`."""
    lengths = [(1, 1), (1, 64), (1, 4000), (5, 5), (24, 3000), (130, 130)]
    heads = (64, 8)
    if small:
        lengths, heads = [(1, 1), (1, 40), (5, 5)], (4, 2)
    ops, plain = TritonOps(device), PlainOps(device)
    kind = str(dtype).removeprefix("torch.")
    for window in (None, 128):
        step = make_step(
            lengths, num_heads=heads[0], num_kv_heads=heads[1], head_dim=64, block_size=64,
            window=window, dtype=dtype, num_padding=2, device=device,
        )  # fmt: skip
        sinks = 3 * torch.randn(heads[0], device=device)
        ops.begin_step(step.batch)
        got = ops.attention(step.qkv, heads[0], 0.125, step.cache, step.batch, None, sinks)
        exact = replace(step.cache, key=step.cache.key.float(), value=step.cache.value.float())
        want = plain.attention(step.qkv.float(), heads[0], 0.125, exact, step.batch, None, sinks)
        yield Check(f"attention {kind} with sinks, window {window}", _error(got, want), limit)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
