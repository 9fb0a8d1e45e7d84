"""How many blocks the cache gets (semantics MEM-1 to MEM-7).

Only what this process uses is counted, and never what is free on the device: a neighbour that takes
or frees memory meanwhile changes nothing.
"""

import math
from collections.abc import Sequence

from pagedcore.cache_spec import CacheGroup, CacheSpec, VectorBytes
from pagedcore.config import CacheConfig
from pagedcore.errors import ConfigError

GIB = 2**30

OUTSIDE_BYTES = GIB
"""Device memory of this process that torch's allocator does not know: the driver's context, loaded
kernels, and the graphs to come. An estimate; a context with its kernels takes about 0.6 GiB."""


def in_gib(num_bytes: int) -> str:
    """An amount of memory as an error tells it, with the digits of a small one."""
    return f"{num_bytes / GIB:.2f}" if num_bytes >= GIB / 8 else f"{num_bytes / GIB:.6f}"


def bytes_per_block(
    groups: Sequence[CacheGroup], block_size: int, vector_bytes: VectorBytes
) -> int:
    """Bytes of one block in all layers.

    A block belongs to one group at a time, so groups share memory: layer i of one group and layer
    i of another whose heads have the same shape use the same buffer.
    """
    largest: dict[tuple[int, int, bool], CacheGroup] = {}
    for group in groups:
        key = buffer_key(group.spec)
        if key not in largest or len(group.layers) > len(largest[key].layers):
            largest[key] = group
    return sum(
        group.spec.bytes_per_block(block_size, vector_bytes) * len(group.layers)
        for group in largest.values()
    )


def buffer_key(spec: CacheSpec) -> tuple[int, int, bool]:
    """Layers with equal keys may share a buffer."""
    return spec.num_kv_heads, spec.head_dim, spec.latent


def requested_bytes(total: int, free: int, utilization: float) -> int:
    """Bytes for this engine (MEM-1); raises ConfigError when so much is not free at the start."""
    requested = math.ceil(total * utilization)
    if free < requested:
        raise ConfigError(
            f"gpu_memory_utilization={utilization:g} asks for {in_gib(requested)} GiB of "
            f"{in_gib(total)} GiB, but only {in_gib(free)} GiB are free: "
            "lower it, or end what else uses the GPU"
        )
    return requested


def check_weights_fit(num_bytes: int, available: int) -> None:
    """Raise ConfigError, before any weight is read, when weights alone are too large."""
    if num_bytes > available:
        raise ConfigError(
            f"the weights need {in_gib(num_bytes)} GiB and {in_gib(available)} GiB are "
            "available: choose a smaller model or a --quantization, or a larger device"
        )


def check_cache_fits(num_bytes: int, available: int) -> None:
    """Raise ConfigError, before any weight is read, when the cache alone is too large."""
    if num_bytes > available:
        raise ConfigError(
            f"a cache of {in_gib(num_bytes)} GiB was asked for and {in_gib(available)} GiB are "
            "available: lower num_gpu_blocks_override, kv_cache_memory_bytes or cpu_kv_cache_gib"
        )


def is_size_given(cache: CacheConfig) -> bool:
    """Whether the cache's size does not depend on what weights leave (MEM-7)."""
    return cache.num_gpu_blocks_override is not None or cache.kv_cache_memory_bytes is not None


def count_blocks(cache: CacheConfig, available: int, block_bytes: int) -> int:
    """Blocks in the pool, the null block included, for `available` bytes (MEM-4, MEM-7)."""
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    if cache.kv_cache_memory_bytes is not None:
        available = cache.kv_cache_memory_bytes
    if block_bytes == 0:  # a model that keeps nothing of the past: a pool has two at least
        return 2
    return max(available, 0) // block_bytes


def longest_that_fits(
    groups: Sequence[CacheGroup], num_blocks: int, block_size: int, max_num_batched_tokens: int
) -> int:
    """Most tokens of one sequence that a pool holds; 0 when it holds none."""
    low, high = 0, max(num_blocks - 1, 0) * block_size
    if all(group.spec.window is not None for group in groups):
        high = 2**31 - 1  # windows leave blocks behind, so that length may not matter
    while low < high:
        middle = (low + high + 1) // 2
        if blocks_for(groups, middle, block_size, max_num_batched_tokens) <= num_blocks - 1:
            low = middle
        else:
            high = middle - 1
    return low


def check_length(
    asked: int | None,
    own: int,
    groups: Sequence[CacheGroup],
    num_blocks: int,
    block_size: int,
    block_bytes: int,
    max_num_batched_tokens: int,
) -> int:
    """The engine's max_model_len: `asked`, or the model's `own`, as MEM-6 allows.

    -1 takes the largest that fits, at most the model's own. Raises ConfigError, with what is
    needed, what is there and the largest length that fits, when one sequence would not.
    """
    longest = longest_that_fits(groups, num_blocks, block_size, max_num_batched_tokens)
    wanted = own if asked in (None, -1) else asked
    assert wanted is not None
    if asked == -1:
        wanted = min(own, longest)
    if wanted > longest or wanted < 1:
        num_needed = blocks_for(groups, max(wanted, 1), block_size, max_num_batched_tokens)
        needed = num_needed * block_bytes
        there = max(num_blocks - 1, 0) * block_bytes
        raise ConfigError(
            f"a sequence of max_model_len={max(wanted, 1)} needs {in_gib(needed)} GiB of cache "
            f"and {in_gib(there)} GiB are available; the largest max_model_len that fits is "
            f"{longest}. Lower max_model_len, or give the cache more memory "
            "(gpu_memory_utilization, kv_cache_memory_bytes; cpu_kv_cache_gib on the CPU)"
        )
    return wanted


def blocks_for(
    groups: Sequence[CacheGroup], length: int, block_size: int, max_num_batched_tokens: int
) -> int:
    """Blocks that one sequence of `length` tokens holds at most at a time, alone in the pool.

    A window leaves blocks behind only once a step has run that looks back on them: beside the
    window, it holds what one step computes. The scheduler counts in the same way.
    """
    total = 0
    chunk = min(length, max_num_batched_tokens)
    for group in groups:
        blocks = -(-length // block_size)
        if group.spec.window is not None:
            blocks = min(blocks, -(-(group.spec.window - 1 + chunk) // block_size) + 1)
        total += blocks
    return total
