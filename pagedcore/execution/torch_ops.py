"""Every operation of `Ops` in plain torch: the CPU's backend, and what other backends must equal.

    T tokens   H query heads   K kv heads   D head size   N blocks   B positions per block

A layer's cache is one tensor [N, B, 2K, D], `LayerCache.key`: the keys of a slot, then its values,
so that a step's tokens are written, and a block is read, in one go. `LayerCache.value` is the part
of it that holds values. Latent vectors are one head [N, B, 1, D]. Scales, where the cache's format
has them, are [N, B, 2K]. Attention has a module of its own, `torch_attention.py`, and so have
experts and what has 8 bits.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.kv_formats import KVFormat
from pagedcore.execution.ops import LayerCache, QKNorm, RopeTable, SamplingTensors, StepBatch
from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_attention import attend
from pagedcore.execution.torch_experts import TorchExpertOps
from pagedcore.execution.torch_latent import TorchLatentOps
from pagedcore.execution.torch_lora import TorchLoraOps
from pagedcore.execution.torch_quantized import TorchQuantizedOps
from pagedcore.execution.torch_sampling import sample
from pagedcore.execution.torch_scores import refine
from pagedcore.execution.torch_shared import (
    angles,
    normed,
    once,
    rotate,
    shared_plan,
    write_slots,
)


class TorchOps(TorchQuantizedOps, TorchExpertOps, TorchLatentOps, TorchLoraOps):
    """The `torch` backend, for any device.

    Small steps on a CPU are bound by the number of calls, about a microsecond each, so operations
    prefer few calls over little memory. Products in bfloat16 go to oneDNN, with weights in its own
    layout: half the time of the plain layout for one token, the same for many.
    """

    name = "torch"
    block_size = 16
    supports_graphs = False
    """Attention reads lengths on the host."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._packs = self._device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()

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
        if self._packs and weight.dtype == torch.bfloat16:
            packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
            return packed
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        if weight.is_mkldnn:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
                x, weight, bias, "none", [], ""
            )
            return out
        return functional.linear(x, weight, bias)

    def pack_head(self, weight: Tensor, stored: Grouped | None) -> Tensor | Grouped:
        """See `Ops.pack_head`: as other weights in the model's type."""
        return self.pack_linear(weight)

    def scores(self, hidden: Tensor, weight: Tensor, packed: Tensor | Grouped) -> Tensor:
        """See `Ops.scores`."""
        assert isinstance(packed, Tensor)
        scores = self.linear(hidden, packed)
        return scores if scores.dtype == torch.float32 else refine(scores, hidden, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return normed(x.float(), weight, eps).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`."""
        total = residual.add_(x)
        return self.rms_norm(total, weight, eps), total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate).mul_(up)

    def gelu_mul(self, gate_up: Tensor, *, tanh: bool) -> Tensor:
        """See `Ops.gelu_mul`."""
        gate, up = gate_up.chunk(2, -1)
        return functional.gelu(gate, approximate="tanh" if tanh else "none").mul_(up)

    def cap_scores(self, scores: Tensor, cap: float) -> Tensor:
        """See `Ops.cap_scores`."""
        return scores.float().div_(cap).tanh_().mul_(cap)

    def new_cache(
        self,
        spec: CacheSpec,
        group: int,
        num_blocks: int,
        block_size: int,
        kv_format: KVFormat,
        device: torch.device,
    ) -> LayerCache:
        """See `Ops.new_cache`. Every format is one that `encode` and `decode` run."""
        first = 0 if spec.latent else spec.num_kv_heads  # of the values
        shape = (num_blocks, block_size, first + spec.num_kv_heads)
        codes = (*shape, kv_format.num_codes(spec.head_dim))
        store = torch.zeros(codes, dtype=kv_format.dtype, device=device)
        values = store[:, :, first:] if first else store
        cache = LayerCache(spec, group, block_size, kv_format, store, values)
        if kv_format.scale_dtype is not None:
            cache.key_scale = torch.zeros(shape, dtype=kv_format.scale_dtype, device=device)
            cache.value_scale = cache.key_scale[:, :, first:]
        return cache

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
        num_kv_heads = cache.spec.num_kv_heads
        heads = qkv.view(len(qkv), -1, cache.spec.head_dim)
        turned = heads[:, :-num_kv_heads]
        if norm is not None or rope is not None:
            value = turned.float()
            if norm is not None:
                weight = once(batch, id(norm), lambda: _head_weights(norm, num_heads, num_kv_heads))
                value = normed(value, weight, norm.eps)
            if rope is not None:
                value = rotate(value, rope, *once(batch, id(rope), lambda: angles(rope, batch)))
            turned.copy_(value)
        write_slots(heads[:, num_heads:], cache, batch)

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
        plan = shared_plan(batch, cache, qkv.dtype)
        return attend(qkv, num_heads, scale, cache, plan, soft_cap, sinks)

    def copy_blocks(self, cache: LayerCache, copies: Tensor) -> None:
        """See `Ops.copy_blocks`."""
        for source, destination, count in copies.tolist():
            for store in (cache.key, cache.key_scale):
                if store is not None:
                    store[destination, :count] = store[source, :count]
                    store[destination, count:] = 0  # it may be NaN; see `torch_attention`

    def sample(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        """See `Ops.sample`."""
        return sample(logits, sampling)


def _head_weights(norm: QKNorm, num_heads: int, num_kv_heads: int) -> Tensor:
    """The norm's weights [H + K, D], for queries and then keys."""
    query = norm.query_weight.float().expand(num_heads, -1)
    return torch.cat([query, norm.key_weight.float().expand(num_kv_heads, -1)])
