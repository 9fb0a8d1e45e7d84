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

from pagedcore.execution.ops import LayerCache, Ops, QKNorm, RopeTable, StepBatch
from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_ops import TorchOps
from pagedcore_kernels.packed_layout import Packed, unpack
from pagedcore_kernels.rope_cache import FP8_LIMIT

logger = logging.getLogger(__name__)

_COMPILER_FAILURES = ("PassManager", "C compiler")
"""In the RuntimeErrors of triton's compiler, which have no class of their own."""

_READS_ON_HOST = frozenset({"attention", "moe"})
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
        unread = self.new_cache(spec, 0, num_tokens, 1, qkv.dtype, qkv.device)
        own_slots = torch.arange(num_tokens, device=qkv.device)[None]
        super().rope_and_cache(qkv, num_heads, rope, norm, unread, replace(batch, slots=own_slots))
        heads = qkv.view(num_tokens, -1, spec.head_dim)
        slots = batch.slots[cache.group]
        block, offset = slots // cache.block_size, slots % cache.block_size
        stored = heads[:, num_heads:]
        if cache.key.dtype == torch.float8_e4m3fn:
            stored = stored.clamp(-FP8_LIMIT, FP8_LIMIT)
        keys, values = stored.to(cache.key.dtype).chunk(2, 1)
        cache.key[block, :, offset] = keys
        cache.value[block, :, offset] = values

    def grouped_linear(self, x: Tensor, weight: Grouped, bias: Tensor | None = None) -> Tensor:
        """See `QuantizedOps.grouped_linear`."""
        if isinstance(weight, Packed):
            weight = unpack(weight)
        return super().grouped_linear(x, weight, bias)

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
        spec = cache.spec
        heads = qkv.view(len(qkv), -1, spec.head_dim)[:, :num_heads].transpose(0, 1)
        out = torch.zeros_like(heads, memory_format=torch.contiguous_format)
        starts, rows = batch.query_start.tolist(), batch.rows.tolist()
        for index, length in enumerate(batch.context_len.tolist()):
            tokens = slice(starts[index], starts[index + 1])
            count = -(-length // cache.block_size)
            blocks = batch.block_tables[cache.group, rows[index], :count].long()
            keys, values = (
                stored[blocks].to(qkv.dtype).transpose(0, 1).flatten(1, 2)[:, :length]
                for stored in (cache.key, cache.value)
            )
            behind = batch.positions[tokens, None] - torch.arange(length, device=qkv.device)
            visible = behind >= 0
            if spec.window is not None:
                visible &= behind < spec.window
            values = values.masked_fill(~visible.any(0)[:, None], 0)  # zero times NaN is NaN
            out[:, tokens] = _attend(
                heads[:, tokens], keys, values, visible, scale, soft_cap, sinks
            )
        return out.transpose(0, 1).flatten(1)

    def copy_blocks(self, cache: LayerCache, copies: Tensor) -> None:
        """See `Ops.copy_blocks`."""
        for source, destination, count in copies.tolist():
            for stored in (cache.key, cache.value):
                stored[destination, :, :count] = stored[source, :, :count]


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Queries [H, Q, D] over keys and values [K, L, D] where visible [Q, L]: [H, Q, D]."""
    num_heads, num_tokens, head_dim = queries.shape
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
    return mixed.reshape(num_heads, num_tokens, head_dim)
