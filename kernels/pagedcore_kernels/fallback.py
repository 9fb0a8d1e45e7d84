"""Fall back to plain torch where a kernel does not compile, with one warning that names it."""

import functools
import logging
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from triton.errors import TritonError

from pagedcore.execution.expert_ops import Experts
from pagedcore.execution.kv_formats import as_is
from pagedcore.execution.ops import LayerCache, Ops, QKNorm, RopeTable, StepBatch
from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_experts import OneExpert
from pagedcore.execution.torch_ops import TorchOps
from pagedcore_kernels.packed_experts import PackedExperts, unpack_expert
from pagedcore_kernels.packed_layout import Packed, unpack

logger = logging.getLogger(__name__)

_COMPILER_FAILURES = ("PassManager", "C compiler")
"""In the RuntimeErrors of triton's compiler, which have no class of their own."""

_READS_ON_HOST = frozenset(
    {"add_lora", "attention", "latent_attention", "latent_to_cache", "moe", "rope_and_cache"}
)
"""Operations of a step whose plain version a graph cannot hold."""


class Replaceable(Protocol):
    """A backend whose operations can be replaced, one by one."""

    replaced: set[str]
    """Operations whose kernel does not compile."""

    plain: Ops
    """What stands in for them."""

    supports_graphs: bool


P = ParamSpec("P")
R = TypeVar("R")
O = TypeVar("O", bound=Replaceable)  # noqa: E741 - one letter, as P and R


def with_fallback(
    operation: Callable[Concatenate[O, P], R],
) -> Callable[Concatenate[O, P], R]:
    """Run an operation of the backend until it fails to compile, and the plain one from then on.

    A kernel is compiled when a dtype or a shape first needs it, so any call may be the one that
    fails; a `try` without an exception costs nothing. An error of compilation comes before the
    kernel starts, so its operands are as they were. Where the plain operation reads on the host,
    steps can no longer be captured.
    """
    name = operation.__name__

    @functools.wraps(operation)
    def run(self: O, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if name not in self.replaced:
            try:
                return operation(self, *args, **kwargs)
            except Exception as error:
                if not is_compile_error(error):
                    raise
                lines = str(error).strip().splitlines() or [type(error).__name__]
                logger.warning(
                    "the kernel of %r does not compile here, plain torch takes its place: "
                    "expect a slower engine. %s",
                    name,
                    lines[-1],
                )
                self.replaced.add(name)
                self.supports_graphs &= name not in _READS_ON_HOST
        plain: Callable[P, R] = getattr(self.plain, name)
        return plain(*args, **kwargs)

    return run


def is_compile_error(error: Exception) -> bool:
    """Whether a kernel could not be built or does not fit the device, so that it never started."""
    if isinstance(error, TritonError | subprocess.CalledProcessError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(part in message for part in _COMPILER_FAILURES)


class PlainOps(TorchOps):
    """Plain torch over caches in the kernels' layout: keys and values, each [N, K, B, D]."""

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
        num_tokens, spec = len(qkv), cache.spec
        unread = self.new_cache(spec, 0, num_tokens, 1, as_is(qkv.dtype), qkv.device)
        own_slots = torch.arange(num_tokens, device=qkv.device)[None]
        super().rope_and_cache(qkv, num_heads, rope, norm, unread, replace(batch, slots=own_slots))
        heads = qkv.view(num_tokens, -1, spec.head_dim)
        slots = batch.slots[cache.group]
        block, offset = slots // cache.block_size, slots % cache.block_size
        codes, scale = cache.kv_format.encode(heads[:, num_heads:])
        cache.key[block, :, offset], cache.value[block, :, offset] = codes.chunk(2, 1)
        if cache.key_scale is not None and cache.value_scale is not None and scale is not None:
            keys, values = scale.chunk(2, 1)
            cache.key_scale[block, :, offset], cache.value_scale[block, :, offset] = keys, values

    def grouped_linear(self, x: Tensor, weight: Grouped, bias: Tensor | None = None) -> Tensor:
        """See `QuantizedOps.grouped_linear`."""
        if isinstance(weight, Packed):
            weight = unpack(weight)
        return super().grouped_linear(x, weight, bias)

    def one_expert(self, experts: Experts, e: int, dtype: torch.dtype) -> OneExpert:
        """See `TorchExpertOps.one_expert`."""
        if isinstance(experts, PackedExperts):
            return unpack_expert(experts, e, dtype)
        return super().one_expert(experts, e, dtype)

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
        queries = qkv.view(len(qkv), -1, cache.spec.head_dim)[:, :num_heads]
        return self._attend(queries, scale, cache, batch, soft_cap, sinks).flatten(1)

    def _attend(
        self,
        queries: Tensor,
        scale: float,
        cache: LayerCache,
        batch: StepBatch,
        soft_cap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of queries [T, H, D]: [T, H, elements of a value]."""
        heads, window = queries.transpose(0, 1), cache.spec.window
        out = queries.new_zeros(*queries.shape[:2], cache.value.shape[-1])
        starts, rows = batch.query_start.tolist(), batch.rows.tolist()
        for index, length in enumerate(batch.context_len.tolist()):
            tokens = slice(starts[index], starts[index + 1])
            count = -(-length // cache.block_size)
            blocks = batch.block_tables[cache.group, rows[index], :count].long()
            keys, values = (
                _decoded(cache, codes, scale, blocks, queries.dtype)[:, :length]
                for codes, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
            )
            behind = batch.positions[tokens, None] - torch.arange(length, device=queries.device)
            visible = behind >= 0
            if window is not None:
                visible &= behind < window
            values = values.masked_fill(~visible.any(0)[:, None], 0)  # zero times NaN is NaN
            mixed = _attend(heads[:, tokens], keys, values, visible, scale, soft_cap, sinks)
            out[tokens] = mixed.transpose(0, 1)
        return out

    def latent_to_cache(
        self,
        query: Tensor,
        unturned: Tensor,
        latent: Tensor,
        rope: RopeTable,
        norm_weight: Tensor,
        eps: float,
        cache: LayerCache,
        batch: StepBatch,
    ) -> None:
        """See `Ops.latent_to_cache`."""
        num_tokens = len(query)
        as_it_is = as_is(latent.dtype)
        unread = self.new_cache(cache.spec, 0, num_tokens, 1, as_it_is, latent.device)
        own_slots = torch.arange(num_tokens, device=latent.device)[None]
        own = replace(batch, slots=own_slots, shared=None)
        super().latent_to_cache(query, unturned, latent, rope, norm_weight, eps, unread, own)
        slots = batch.slots[cache.group]
        block, offset = slots // cache.block_size, slots % cache.block_size
        cache.key[block, 0, offset], _ = cache.kv_format.encode(unread.key[:, 0, 0])

    def latent_attention(
        self, query: Tensor, num_values: int, scale: float, cache: LayerCache, batch: StepBatch
    ) -> Tensor:
        """See `Ops.latent_attention`."""
        values = replace(cache, value=cache.key[..., :num_values])
        return self._attend(query, scale, values, batch, None, None)

    def copy_blocks(self, cache: LayerCache, copies: Tensor) -> None:
        """See `Ops.copy_blocks`."""
        for source, destination, count in copies.tolist():
            for stored in (cache.key, cache.value, cache.key_scale, cache.value_scale):
                if stored is not None:
                    stored[destination, :, :count] = stored[source, :, :count]


def _decoded(
    cache: LayerCache, codes: Tensor, scale: Tensor | None, blocks: Tensor, dtype: torch.dtype
) -> Tensor:
    """Keys or values of blocks, one after the other: [K, L, D]."""
    scale = None if scale is None else scale[blocks]
    return cache.kv_format.decode(codes[blocks], scale, dtype).transpose(0, 1).flatten(1, 2)


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Queries [H, Q, D] over keys and values [K, L, ...] where visible [Q, L]: [H, Q, ...]."""
    num_heads, num_tokens, _ = queries.shape
    grouped = queries.unflatten(0, (len(keys), -1))
    scores = torch.einsum("kgqd,kld->kgql", grouped, keys).float() * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        more = sinks.view(len(keys), -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, more], -1)
    weights = scores.softmax(-1)[..., : visible.shape[1]]
    mixed = torch.einsum("kgql,kld->kgqd", weights.to(values.dtype), values)
    return mixed.reshape(num_heads, num_tokens, -1)
