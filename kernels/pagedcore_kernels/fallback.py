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
from pagedcore.execution.torch_ops import TorchOps

logger = logging.getLogger(__name__)

_COMPILER_FAILURES = ("PassManager", "C compiler")
"""In the RuntimeErrors of triton's compiler, which have no class of their own."""


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
    kernel starts, so its operands are as they were. Plain operations may read on the host, so that
    steps are no longer captured.
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
                self.supports_graphs = False
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
    """Plain torch over caches in the kernels' layout, [N, K, B, D] in place of [N, B, K, D]."""

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
        num_tokens = len(qkv)
        written = self.new_cache(
            cache.spec, 0, num_tokens, 1, cache.key.dtype, qkv.device
        )  # a block for each token
        own_slots = torch.arange(num_tokens, device=qkv.device)[None]
        super().rope_and_cache(qkv, num_heads, rope, norm, written, replace(batch, slots=own_slots))
        slots = batch.slots[cache.group]
        block, offset = slots // cache.block_size, slots % cache.block_size
        cache.key[block, :, offset] = written.key[:, 0]
        cache.value[block, :, offset] = written.value[:, 0]

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
        return super().attention(qkv, num_heads, scale, _transposed(cache), batch, soft_cap)

    def copy_blocks(self, cache: LayerCache, copies: Tensor) -> None:
        """See `Ops.copy_blocks`."""
        super().copy_blocks(_transposed(cache), copies)


def _transposed(cache: LayerCache) -> LayerCache:
    return replace(cache, key=cache.key.transpose(1, 2), value=cache.value.transpose(1, 2))
