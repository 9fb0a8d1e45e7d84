"""NativeOps: the CPU's operations in bfloat16 as C kernels, and `TorchOps` for everything else.

Caches have `TorchOps`'s layout. What a kernel was not made for, such as another type, a head of odd
size or rows that are spread out, is left to the plain operation. A step of one token spends a third
of its time on what surrounds the kernels, hence the care about calls here.
"""

from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.kv_formats import KVFormat
from pagedcore.execution.native.grouped_ops import GroupedOps, is_packed
from pagedcore.execution.ops import LayerCache, QKNorm, RopeTable, SamplingTensors, StepBatch

_MAX_HEAD, _MAX_GROUP = 256, 96
"""Limits of the attention kernel: head size, query heads that share keys."""


@dataclass(slots=True)
class _Cache(LayerCache):
    """A cache that the kernels read and write."""

    store: int = field(kw_only=True)
    """Its address."""


class NativeOps(GroupedOps):
    """The `native` backend."""

    name = "native"

    def __init__(self, device: str) -> None:
        """Raises ConfigError, saying why, where the kernels cannot run."""
        super().__init__(device)
        self._library.threads(torch.get_num_threads())

    def begin_step(self, batch: StepBatch) -> None:
        """See `Ops.begin_step`."""
        super().begin_step(batch)
        self._library.threads(torch.get_num_threads())

    def pack_linear(self, weight: Tensor) -> Tensor:
        """See `Ops.pack_linear`."""
        if not is_packed(weight):
            return weight
        packed = self.take_room(*weight.shape)
        weight = weight.contiguous()
        self._library.pack(weight.data_ptr(), *weight.shape, packed.data_ptr())
        return packed

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        if not is_packed(weight):
            return super().linear(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.shape[0])
        self._multiply(x, weight, bias, out, is_float=False)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        if not (_are_rows(x) and weight.dtype == torch.bfloat16):
            return super().rms_norm(x, weight, eps)
        out = torch.empty_like(x)
        self._library.rms_norm(x.data_ptr(), None, weight.data_ptr(), eps, out.data_ptr(), *x.shape)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`."""
        if not (_are_rows(x) and _are_rows(residual) and weight.dtype == torch.bfloat16):
            return super().add_rms_norm(x, residual, weight, eps)
        address = x.data_ptr()  # a row's norm may take the place of what was added to it
        self._library.rms_norm(
            address, residual.data_ptr(), weight.data_ptr(), eps, address, *x.shape
        )
        return x, residual

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        if not _are_rows(gate_up):
            return super().silu_mul(gate_up)
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(tokens, width)
        self._library.silu_mul(gate_up.data_ptr(), out.data_ptr(), tokens, width)
        return out

    def new_cache(
        self,
        spec: CacheSpec,
        group: int,
        num_blocks: int,
        block_size: int,
        kv_format: KVFormat,
        device: torch.device,
    ) -> LayerCache:
        """See `Ops.new_cache`. Formats but bfloat16 itself are left to plain attention."""
        cache = super().new_cache(spec, group, num_blocks, block_size, kv_format, device)
        fits = spec.head_dim % 32 == 0 and spec.head_dim <= _MAX_HEAD and not spec.latent
        if not kv_format.is_exact(torch.bfloat16) or not fits:
            return cache
        address = cache.key.data_ptr()
        return _Cache(spec, group, block_size, kv_format, cache.key, cache.value, store=address)

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
        if not _fits(cache, qkv, num_heads):
            super().rope_and_cache(qkv, num_heads, rope, norm, cache, batch)
            return
        query_weight = key_weight = None
        if norm is not None:
            query_weight, key_weight = norm.query_weight.bfloat16(), norm.key_weight.bfloat16()
        self._library.rope_and_cache(
            qkv.data_ptr(),
            qkv.stride(0),
            qkv.shape[0],
            num_heads,
            cache.spec.num_kv_heads,
            cache.spec.head_dim,
            None if rope is None else rope.cos_sin.data_ptr(),
            0 if rope is None else rope.cos_sin.shape[1],
            rope is not None and rope.interleaved,
            None if query_weight is None else query_weight.data_ptr(),
            None if key_weight is None else key_weight.data_ptr(),
            0.0 if norm is None else norm.eps,
            batch.positions.data_ptr(),
            batch.slots[cache.group].data_ptr(),
            cache.store,
        )

    def attention(
        self,
        qkv: Tensor,
        num_heads: int,
        scale: float,
        cache: LayerCache,
        batch: StepBatch,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `Ops.attention`."""
        if not _fits(cache, qkv, num_heads):
            return super().attention(qkv, num_heads, scale, cache, batch, soft_cap, sinks)
        assert sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
        spec, table = cache.spec, batch.block_tables[cache.group]
        out = qkv.new_empty(qkv.shape[0], num_heads * spec.head_dim)
        failed = self._library.attention(
            qkv.data_ptr(),
            qkv.stride(0),
            cache.store,
            table.data_ptr(),
            table.stride(0),
            batch.rows.data_ptr(),
            batch.query_start.data_ptr(),
            batch.context_len.data_ptr(),
            batch.rows.shape[0],
            num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            cache.block_size,
            spec.window or 0,
            scale,
            soft_cap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the list of a step's sequences")
        return out

    def sample(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        """See `Ops.sample`."""
        greedy = sampling.all_greedy and logits.dtype == torch.float32 and logits.is_contiguous()
        if not greedy:
            return super().sample(logits, sampling)
        out = logits.new_empty(logits.shape[0], dtype=torch.int64)
        self._library.argmax(logits.data_ptr(), out.data_ptr(), *logits.shape)
        return out


def _are_rows(x: Tensor) -> bool:
    """Whether the kernels read x [T, h]."""
    return x.dtype == torch.bfloat16 and x.is_contiguous()


def _fits(cache: LayerCache, qkv: Tensor, num_heads: int) -> TypeGuard[_Cache]:
    """Whether the kernels run this layer's attention.

    The same for `rope_and_cache` and `attention`: plain attention relies on the plain
    `rope_and_cache` to clear blocks.
    """
    return (
        isinstance(cache, _Cache)
        and qkv.dtype == torch.bfloat16
        and qkv.stride(1) == 1
        and num_heads <= _MAX_GROUP * cache.spec.num_kv_heads
    )
