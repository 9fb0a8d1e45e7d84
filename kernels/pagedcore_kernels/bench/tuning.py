"""Search for the best settings of both attention kernels, for the shapes of a few cases."""

from collections.abc import Iterator
from itertools import product

from triton.errors import TritonError

from pagedcore.execution.kernel_bench import Trial
from pagedcore_kernels.bench.clock import time_calls
from pagedcore_kernels.bench.speed import AttentionCase, Pool, decode_calls, extend_calls
from pagedcore_kernels.decode_attention import DecodeConfig
from pagedcore_kernels.extend_plan import ExtendConfig


def decode_configs() -> Iterator[DecodeConfig]:
    """Settings whose programs fit a multiprocessor of 227 KiB together."""
    for tile, warps, stages in product((64, 32), (2, 4, 8), (2, 3, 4)):
        if tile // warps < 8:
            continue
        for programs in (1, 2, 3, 4):
            if programs * ((stages - 1) * (2 * tile + 16) * 256 + 9216) <= 228_000:
                yield DecodeConfig(tile, warps, stages, programs, min_share=256 // tile)


def extend_configs() -> Iterator[ExtendConfig]:
    """Settings that fit one multiprocessor, alone or, with few registers, two at a time."""
    for descriptors in (False, True):
        for keys, stages, registers in product((32, 64), (2, 3), (None, 128)):
            yield ExtendConfig(128, keys, 8, stages, registers, descriptors)
        yield ExtendConfig(64, 64, 4, 2, None, descriptors)
        yield ExtendConfig(64, 64, 4, 3, None, descriptors)
    yield ExtendConfig(128, 128, 8, 2)


def tune(
    cases: list[AttentionCase],
    pool: Pool,
    num_sms: int,
    configs: list[DecodeConfig] | list[ExtendConfig],
) -> Iterator[Trial]:
    """Time every setting in every case; those that do not compile are left out."""
    for case in cases:
        for config in configs:
            try:
                if isinstance(config, DecodeConfig):
                    calls = decode_calls(case, pool, config, num_sms)
                    work = case.bytes_read(pool.kv_format)
                else:
                    calls = extend_calls(case, pool, config, num_sms)
                    work = case.operations
                passed = time_calls(calls, budget_s=0.02)
            except TritonError:
                continue
            yield Trial(str(case), config, work / passed.median * 1e6)
