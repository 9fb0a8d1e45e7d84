"""Every operation of `Ops` in plain torch: the CPU's backend, and what other backends must equal.

    T tokens   H query heads   K kv heads   D head size   N blocks   B positions per block

Keys and values of a layer are two tensors [N, B, K, D]: a slot is one row of [N * B, K, D].
Attention has a module of its own, `torch_attention.py`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.ops import LayerCache, QKNorm, RopeTable, SamplingTensors, StepBatch
from pagedcore.execution.torch_attention import attend
from pagedcore.execution.torch_sampling import sample


class TorchOps:
    """The `torch` backend, for any device."""

    name = "torch"
    block_size = 16
    supports_graphs = False
    """Attention over prompts reads lengths on the host."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def begin_step(self, batch: StepBatch) -> None:
        """See `Ops.begin_step`."""
        batch.shared = {}

    def decode_inputs(
        self,
        tokens: Tensor,
        block_tables: Tensor,
        rows: Tensor,
        positions: Tensor,
        block_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Ops.decode_inputs`."""
        block = block_tables[:, rows, positions // block_size].long()
        context_len = (positions + 1) * (rows != len(tokens) - 1)
        return (
            tokens[rows, positions].long(),
            rows.int(),
            context_len.int(),
            block * block_size + positions % block_size,
        )

    def advance_rows(
        self, drawn: Tensor, logits: Tensor, tokens: Tensor, rows: Tensor, positions: Tensor
    ) -> Tensor:
        """See `Ops.advance_rows`."""
        tokens[rows, positions + 1] = drawn.int()
        positions += rows != len(tokens) - 1
        is_good = logits.gather(1, drawn[:, None])[:, 0].isfinite()
        return torch.where(is_good, drawn, -1 - drawn)

    def pack_linear(self, weight: Tensor) -> Tensor:
        """See `Ops.pack_linear`."""
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return functional.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`."""
        total = residual.add_(x)
        return functional.rms_norm(total, weight.shape, weight, eps), total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate).mul_(up)

    def new_cache(
        self,
        spec: CacheSpec,
        group: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LayerCache:
        """See `Ops.new_cache`."""
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        key, value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return LayerCache(spec, group, block_size, key, value)

    def rope_and_cache(
        self,
        qkv: Tensor,
        num_heads: int,
        rope: RopeTable | None,
        norm: QKNorm | None,
        cache: LayerCache,
        batch: StepBatch,
    ) -> None:
        """See `Ops.rope_and_cache`."""
        num_kv_heads, head_dim = cache.spec.num_kv_heads, cache.spec.head_dim
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
        turned = heads[:, : num_heads + num_kv_heads]
        if rope is not None or norm is not None:
            value = turned.float()
            if norm is not None:
                query, key = value[:, :num_heads], value[:, num_heads:]
                value = torch.cat(
                    [
                        functional.rms_norm(
                            query, (head_dim,), norm.query_weight.float(), norm.eps
                        ),
                        functional.rms_norm(key, (head_dim,), norm.key_weight.float(), norm.eps),
                    ],
                    1,
                )
            if rope is not None:
                value = _rotate(value, rope, batch.positions)
            turned.copy_(value)
        slots = batch.slots[cache.group]
        key, value = heads[:, num_heads:].chunk(2, 1)
        cache.key.flatten(0, 1).index_copy_(0, slots, key.to(cache.key.dtype))
        cache.value.flatten(0, 1).index_copy_(0, slots, value.to(cache.value.dtype))

    def attention(
        self,
        qkv: Tensor,
        num_heads: int,
        scale: float,
        cache: LayerCache,
        batch: StepBatch,
        soft_cap: float | None = None,
    ) -> Tensor:
        """See `Ops.attention`."""
        return attend(qkv, num_heads, scale, cache, batch, soft_cap)

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        gate_up: Tensor,
        down: Tensor,
        num_chosen: int,
        *,
        normalize: bool,
    ) -> Tensor:
        """See `Ops.moe`."""
        probabilities = router_logits.float().softmax(-1)
        weights, experts = probabilities.topk(num_chosen, -1)
        if normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in sorted(set(experts.flatten().tolist())):
            token, choice = torch.where(experts == expert)
            out = functional.linear(
                self.silu_mul(functional.linear(x[token], gate_up[expert])), down[expert]
            )
            mixed.index_add_(0, token, out.float() * weights[token, choice, None])
        return mixed.to(x.dtype)

    def copy_blocks(self, cache: LayerCache, copies: Tensor) -> None:
        """See `Ops.copy_blocks`."""
        for source, destination, count in copies.tolist():
            cache.key[destination, :count] = cache.key[source, :count]
            cache.value[destination, :count] = cache.value[source, :count]

    def sample(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        """See `Ops.sample`."""
        return sample(logits, sampling)


def _rotate(heads: Tensor, rope: RopeTable, positions: Tensor) -> Tensor:
    """Turn heads [T, heads, D] float32 by the angles of their positions."""
    rotated = rope.cos_sin.shape[1]
    cos, sin = rope.cos_sin[positions][:, None].chunk(2, -1)
    head, rest = heads[..., :rotated], heads[..., rotated:]
    if rope.interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
    else:
        first, second = head.chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    head = torch.stack(turned, -1).flatten(-2) if rope.interleaved else torch.cat(turned, -1)
    return torch.cat([head, rest], -1) if rest.shape[-1] else head
