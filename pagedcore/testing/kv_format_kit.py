"""The KV format kit: does a cache hold what it is given, as exactly and as small as promised?

T tokens   H query heads   K kv heads   D head size
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.errors import PluginError
from pagedcore.execution.kv_formats import KVFormat, as_is
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.backend_steps import DrawnStep, draw_step
from pagedcore.testing.checks import Check

SIZES = (16, 64, 80, 128)
"""Elements of a vector."""

DTYPES = (torch.float32, torch.bfloat16)
"""Of models."""

NUM_HEADS, NUM_KV_HEADS = 4, 2

Factory = Callable[[torch.dtype], KVFormat]


def kv_format_checks(name: str, factory: Factory) -> Iterator[Check]:
    """What one format promises."""
    subject = f"kv format {name}"
    for dtype in DTYPES:
        words = str(dtype).removeprefix("torch.")
        yield Check(subject, f"error in {words}", partial(check_error, factory, dtype))
    yield Check(subject, "size", partial(check_size, factory))
    yield Check(subject, "keeps zeros", partial(check_zeros, factory))
    yield Check(subject, "shows NaN", partial(check_nan, factory))
    yield Check(subject, "attention over what it holds", partial(check_attention, factory))


def check_error(factory: Factory, dtype: torch.dtype) -> str:
    """Encode and decode normal numbers; raise PluginError where more is lost than promised."""
    kv_format, largest = factory(dtype), 0.0
    for size in SIZES:
        x = _draw(300, 3, size).to(dtype)
        got = _through(kv_format, x)
        largest = max(largest, float((got.double() - x.double()).norm() / x.double().norm()))
    if not largest <= kv_format.max_error:
        raise PluginError(f"the error is {largest:.3g}; {kv_format.max_error:.3g} was promised")
    return f"error {largest:.2g}, at most {kv_format.max_error:.2g}"


def check_size(factory: Factory) -> str:
    """Compare the bytes that are told with those that `encode` makes."""
    kv_format = factory(torch.bfloat16)
    for size in SIZES:
        codes, scale = kv_format.encode(_draw(5, 3, size).bfloat16())
        if (scale is None) != (kv_format.scale_dtype is None):
            raise PluginError(f"scale_dtype is {kv_format.scale_dtype}, and encode gives {scale}")
        given = [codes] if scale is None else [codes, scale]
        want: list[tuple[tuple[int, ...], torch.dtype]]
        want = [((5, 3, kv_format.num_codes(size)), kv_format.dtype)]
        want += [] if kv_format.scale_dtype is None else [((5, 3), kv_format.scale_dtype)]
        for tensor, (shape, dtype) in zip(given, want, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype:
                raise PluginError(
                    f"encode gives {tensor.dtype} {list(tensor.shape)} for vectors of {size} "
                    f"elements; {dtype} {list(shape)} was told"
                )
        if sum(tensor.nbytes for tensor in given) != 15 * kv_format.vector_bytes(size):
            raise PluginError(f"vector_bytes({size}) is not what codes and scale take")
    return f"{kv_format.vector_bytes(128)} bytes of a vector of 128"


def check_zeros(factory: Factory) -> str:
    """A vector of zeros stays one, and a slot that nobody wrote holds numbers that are finite."""
    kv_format = factory(torch.float32)
    x = _draw(4, 3, 64)
    x[1] = 0
    if _through(kv_format, x)[1].any():
        raise PluginError("a vector of zeros becomes another one")
    codes, scale = kv_format.encode(x)
    empty = torch.zeros_like(codes), None if scale is None else torch.zeros_like(scale)
    if not kv_format.decode(*empty, torch.float32).isfinite().all():
        raise PluginError("codes and scales of zero decode to what is not finite")
    return ""


def check_nan(factory: Factory) -> str:
    """NaN is seen after decoding, in its vector alone."""
    kv_format = factory(torch.float32)
    x = _draw(4, 3, 64)
    x[2, 1, 5] = torch.nan
    shows = _through(kv_format, x).isnan()
    if not shows[2, 1, 5]:
        raise PluginError("NaN becomes a number")
    shows[2, 1] = False
    if shows.any():
        raise PluginError("NaN of one vector reaches another")
    return ""


def check_attention(factory: Factory) -> str:
    """Paged attention of the backend `torch` equals attention over the decoded numbers."""
    kv_format, head_dim = factory(torch.float32), 64
    step = draw_step(_generator(), lengths=[(1, 1), (1, 37), (5, 5), (11, 30)])
    columns = (NUM_HEADS + 2 * NUM_KV_HEADS) * head_dim
    past, new = _draw(sum(step.past), columns), _draw(step.num_tokens, columns)
    got = _attend(kv_format, past, new, head_dim, step)
    for qkv in (past, new):
        heads = qkv.view(len(qkv), -1, head_dim)[:, NUM_HEADS:]
        heads.copy_(_through(kv_format, heads))
    want = _attend(as_is(torch.float32), past, new, head_dim, step)
    error = float((got - want).norm() / want.norm())
    if not error <= 1e-5:
        raise PluginError(f"the error of attention over decoded numbers is {error:.3g}")
    return f"error {error:.1g}"


def _attend(
    kv_format: KVFormat, past: Tensor, new: Tensor, head_dim: int, step: DrawnStep
) -> Tensor:
    ops, spec = TorchOps("cpu"), CacheSpec(num_kv_heads=NUM_KV_HEADS, head_dim=head_dim)
    cache = ops.new_cache(spec, 0, step.num_blocks, step.block_size, kv_format, torch.device("cpu"))
    for qkv, batch in ((past, step.past_batch), (new, step.batch)):
        ops.begin_step(batch)
        ops.rope_and_cache(qkv.clone(), NUM_HEADS, None, None, cache, batch)
    return ops.attention(new, NUM_HEADS, head_dim**-0.5, cache, step.batch)


def _through(kv_format: KVFormat, x: Tensor) -> Tensor:
    return kv_format.decode(*kv_format.encode(x), x.dtype)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator())
