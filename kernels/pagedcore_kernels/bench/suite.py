"""All checks, cases and settings that the kernels are measured with: `KernelBench` of `triton`."""

from collections.abc import Iterator, Mapping
from itertools import chain

import torch

from pagedcore.errors import ConfigError
from pagedcore.execution.kernel_bench import Check, Figure, Trial, Unit
from pagedcore.execution.kv_formats import Int8, KVFormat, fp8
from pagedcore_kernels.bench.checks import check_kernels
from pagedcore_kernels.bench.clock import copy_bandwidth, product_rate
from pagedcore_kernels.bench.packed_checks import check_packed
from pagedcore_kernels.bench.packed_tuning import packed_cases, tune_packed
from pagedcore_kernels.bench.speed import (
    BLOCK_SIZE,
    HEAD_DIM,
    NUM_KV_HEADS,
    AttentionCase,
    Pool,
    attention_figures,
    dense_attention_figures,
    moe_figures,
    rope_figures,
    row_figures,
)
from pagedcore_kernels.bench.tuning import decode_configs, extend_configs, tune
from pagedcore_kernels.decode_attention import DecodeConfig, choose_decode
from pagedcore_kernels.extend_plan import ExtendConfig, choose_extend
from pagedcore_kernels.tuned_plans import plans_file

HEADS = ((16, 8), (32, 8), (32, 4))
"""Query and kv heads of Qwen3-0.6B, Llama-3.1-8B and Qwen3-30B-A3B."""

BLOCK_BYTES = 2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM * 2
"""Keys and values of a pool's block, in 16 bits."""

EIGHT_BITS = (fp8(), Int8())
"""Formats of keys and values that are timed beside the queries' own type."""

TUNING_GIB = 8.0
"""Of cached keys and values are enough to tell settings apart."""


def decode_cases() -> list[AttentionCase]:
    """Sequences of one length, and two mixtures, for each kind of heads."""
    cases = []
    for heads in HEADS:
        for batch in (1, 32, 64, 256, 1024):
            cases += [AttentionCase(*heads, (context,) * batch) for context in (256, 1024, 4096)]
        mixed = tuple(int(n) for n in torch.linspace(100, 1124, 256))
        steep = (8192,) * 8 + (819,) * 56
        cases += [AttentionCase(*heads, mixed), AttentionCase(*heads, steep)]
    return cases


def extend_cases() -> list[AttentionCase]:
    """Whole prompts, alone and together, and prompts that go on behind what is cached."""
    cases = []
    for heads in HEADS[:2]:
        cases += [AttentionCase(*heads, (n,), n) for n in (1024, 4096, 16384)]
        cases += [AttentionCase(*heads, (4096,) * 4, 4096), AttentionCase(*heads, (512,) * 16, 512)]
        cases += [AttentionCase(*heads, (4160,), 64), AttentionCase(*heads, (10240,), 2048)]
    return cases


class Suite:
    """See `KernelBench`. `small` takes tiny shapes in float16, which triton's interpreter knows."""

    tunable: tuple[str, ...] = ("decode", "extend", "packed")

    def __init__(
        self,
        device: str,
        *,
        num_sms: int,
        shared_memory: int,
        small: bool = False,
        cache_gib: float = 16.0,
    ) -> None:
        if cache_gib * 2**30 < BLOCK_BYTES:
            raise ConfigError(f"cache_gib must hold one block of 256 KiB at least, not {cache_gib}")
        self._device = device
        self._num_sms = num_sms
        self._shared_memory = shared_memory
        self._small = small
        self._cache_gib = cache_gib
        self._dtype = torch.float16 if small else torch.bfloat16

    def ceilings(self) -> Mapping[Unit, float]:
        """See `KernelBench.ceilings`."""
        copy = copy_bandwidth(self._device, 1 << (20 if self._small else 30))
        product = product_rate(self._device, self._dtype, 64 if self._small else 8192)
        return {"B/s": copy, "FLOP/s": product}

    def checks(self) -> Iterator[Check]:
        """See `KernelBench.checks`."""
        yield from check_kernels(self._device, small=self._small)
        yield from check_packed(self._device, small=self._small)

    def figures(self) -> Iterator[Figure]:
        """See `KernelBench.figures`."""
        device = self._device
        if self._small:
            cases = [AttentionCase(4, 2, (70, 3)), AttentionCase(4, 2, (70,), 70)]
            for kv_format in (None, Int8()):
                pool = Pool(64, self._dtype, device, kv_format)
                yield from self._attention(pool, cases)
                yield from rope_figures(pool, [3])
            yield from row_figures(device, [(3, 64)])
            yield from moe_figures(device, [3], (8, 2, 64, 32))
            return
        pool = self._pool(self._cache_gib)
        cases = [*decode_cases(), *extend_cases()]
        room = pool.num_blocks * BLOCK_BYTES
        yield from chain(
            # a case that would read a block twice would find it in the L2 cache
            self._attention(pool, [c for c in cases if c.bytes_read(pool.kv_format) <= room]),
            *map(self._in_eight_bits, EIGHT_BITS),
            dense_attention_figures(extend_cases(), device),
            rope_figures(pool, [1, 256, 8192]),
            row_figures(device, [(1, 1024), (256, 1024), (256, 4096), (16384, 1024), (8192, 4096)]),
            moe_figures(device, [1, 32, 256, 4096], (128, 8, 2048, 768)),
        )

    def _in_eight_bits(self, kv_format: KVFormat) -> Iterator[Figure]:
        """Attention, and what writes the cache, where keys and values are kept so."""
        pool = self._pool(TUNING_GIB, kv_format)
        cases = [
            AttentionCase(*heads, (context,) * batch)
            for heads in HEADS[:2]
            for batch, context in ((1, 4096), (32, 1024), (64, 4096), (256, 1024))
        ]
        cases += [AttentionCase(32, 8, (4096,), 4096), AttentionCase(32, 8, (10240,), 2048)]
        room = pool.num_blocks * BLOCK_BYTES // 2
        yield from self._attention(pool, [c for c in cases if c.bytes_read(kv_format) <= room])
        yield from rope_figures(pool, [256, 8192])

    def trials(self, kernel: str) -> Iterator[Trial]:
        """See `KernelBench.trials`."""
        if kernel == "packed":
            path = None if self._small else plans_file(torch.device(self._device))
            return tune_packed(packed_cases(small=self._small), self._device, self._dtype, path)
        pool = Pool(64, self._dtype, self._device) if self._small else self._pool(TUNING_GIB)
        cases, configs = self._tuning(kernel)
        return tune(cases, pool, self._num_sms, configs)

    def _tuning(
        self, kernel: str
    ) -> tuple[list[AttentionCase], list[DecodeConfig] | list[ExtendConfig]]:
        if kernel == "decode":
            cases = [
                AttentionCase(*heads, (context,) * batch)
                for heads in HEADS
                for batch, context in ((1, 1024), (32, 256), (256, 256), (256, 1024))
            ]
            return [AttentionCase(4, 2, (70, 3))] if self._small else cases, [*decode_configs()]
        if kernel == "extend":
            cases = [
                AttentionCase(*heads, (length,) * num, length)
                for heads in HEADS[:2]
                for num, length in ((1, 1024), (4, 4096))
            ]
            return [AttentionCase(4, 2, (70,), 70)] if self._small else cases, [*extend_configs()]
        raise ConfigError(f"only {', '.join(self.tunable)} have settings, not {kernel!r}")

    def _attention(self, pool: Pool, cases: list[AttentionCase]) -> Iterator[Figure]:
        kept = pool.kv_format.dtype
        decode = choose_decode(HEAD_DIM, kept, BLOCK_SIZE, self._shared_memory)

        def extend(group: int) -> ExtendConfig:
            return choose_extend(HEAD_DIM, self._dtype, group, self._shared_memory)

        return attention_figures(pool, decode, extend, self._num_sms, cases)

    def _pool(self, gib: float, kv_format: KVFormat | None = None) -> Pool:
        """A pool in the GPU's memory, no larger than what was asked for in 16 bits."""
        num_blocks = int(min(gib, self._cache_gib) * 2**30) // BLOCK_BYTES
        return Pool(num_blocks, self._dtype, self._device, kv_format)
