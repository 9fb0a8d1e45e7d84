"""How a start would share out memory: what `Executor` would get, without a device or a weight.

    R sequences at a time   L longest sequence   B positions per block

The arithmetic is that of a start (`memory`, semantics MEM-1 to MEM-7). What a start measures, the
peak of the largest step, is estimated by `Survey.step_bytes`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pluggy
import torch

from pagedcore.config import EngineConfig, Usage
from pagedcore.errors import ConfigError, PagedcoreError
from pagedcore.execution import memory
from pagedcore.execution.devices import available_bytes
from pagedcore.execution.plan import Gpu, GroupPlan, Plan, Remedy
from pagedcore.execution.survey import Survey, survey

ON_LOAD = "fp8"
"""The weight format that any checkpoint of 16 bits can be asked for."""

SMALL_CACHES = ("fp8", "int8")
"""Cache formats of 8 bits, the smaller one first."""


def plan_engine(
    config: EngineConfig,
    folder: Path,
    plugins: pluggy.PluginManager,
    *,
    gpu: Gpu | None,
    usage: Usage = "serve",
) -> tuple[Plan, EngineConfig]:
    """The plan, and the configuration with every default filled in; `gpu` None is the CPU.

    A plan that does not fit says so and what would help. Raises ConfigError, ModelError,
    PluginError or UnknownNameError for a start that fails whatever memory there is.
    """
    found = survey(config, folder, plugins, on_gpu=gpu is not None)
    plan, resolved = share_out(config, found, gpu, usage)
    if not plan.fits:
        plan = replace(plan, remedies=_remedies(config, folder, plugins, found, plan, gpu, usage))
    return plan, resolved


def share_out(
    config: EngineConfig, found: Survey, gpu: Gpu | None, usage: Usage
) -> tuple[Plan, EngineConfig]:
    """As `build_executor` does it."""
    asked = config.model.max_model_len
    config = config.resolve(
        usage=usage,
        device_memory_gib=None if gpu is None else gpu.total_bytes / memory.GIB,
        is_a100=gpu is not None and gpu.is_a100,
        max_model_len=found.own_length if asked in (None, -1) else asked,
        block_size=found.block_size,
        chunks_prompts=bool(found.groups),
    )
    num_seqs, budget = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
    block_size, length = config.cache.block_size, config.model.max_model_len
    assert num_seqs is not None
    assert budget is not None
    assert block_size is not None
    assert length is not None
    vector_bytes = found.kv_format.vector_bytes
    block_bytes = memory.bytes_per_block(found.groups, block_size, vector_bytes)
    total, requested, for_cache, step_bytes = _for_cache(config, found, gpu, budget, num_seqs)
    problem = None
    num_blocks = memory.count_blocks(config.cache, for_cache, block_bytes)
    longest = memory.longest_that_fits(found.groups, num_blocks, block_size, budget)
    try:
        memory.check_weights_fit(found.weight_bytes, requested)
        length = memory.check_length(
            asked, found.own_length, found.groups, num_blocks, block_size, block_bytes, budget
        )
        if gpu is None or memory.is_size_given(config.cache):
            memory.check_cache_fits(num_blocks * block_bytes, requested)
    except ConfigError as error:
        problem = str(error)
    holds = _Holds(found, num_blocks, block_size, budget, num_seqs)
    concurrency = holds.exactly(length)
    plan = Plan(
        architecture=found.architecture,
        device="cpu" if gpu is None else "gpu",
        dtype=_name(found.dtype),
        cache_dtype=_name(found.kv_format.dtype),
        quantization=found.quantization,
        backend=found.backend,
        total_bytes=total,
        requested_bytes=requested,
        weight_bytes=found.weight_bytes,
        step_bytes=step_bytes,
        outside_bytes=0 if gpu is None else memory.OUTSIDE_BYTES,
        cache_bytes=num_blocks * block_bytes,
        row_bytes=_row_bytes(num_seqs, length, len(found.groups), block_size),
        groups=_groups(found),
        block_size=block_size,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        kv_bytes_per_token=len(found.groups) * block_bytes // block_size,
        max_model_len=length,
        longest_that_fits=min(longest, found.own_length),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=budget,
        concurrency=concurrency,
        limit="memory" if concurrency is not None and concurrency < num_seqs else "max_num_seqs",
        concurrency_by_length=holds.by_length(length),
        problem=problem,
        notes=found.notes,
    )
    return plan, replace(config, model=replace(config.model, max_model_len=length))


def _for_cache(
    config: EngineConfig, found: Survey, gpu: Gpu | None, budget: int, num_seqs: int
) -> tuple[int, int, int, int]:
    """Bytes of the device, of them for the engine, of them for the cache, and of the step."""
    if gpu is None:
        total = available_bytes(config, torch.device("cpu"))
        return total, total, int(config.cache.cpu_kv_cache_gib * memory.GIB), 0
    total = gpu.total_bytes
    requested = total
    if config.cache.kv_cache_memory_bytes is None:
        requested = memory.requested_bytes(total, total, config.cache.gpu_memory_utilization)
    step_bytes = found.step_bytes(budget, num_seqs)
    left = requested - found.weight_bytes - step_bytes - memory.OUTSIDE_BYTES
    return total, requested, left, step_bytes


class _Holds:
    """How many sequences of a length a pool holds."""

    def __init__(
        self, found: Survey, num_blocks: int, block_size: int, budget: int, num_seqs: int
    ) -> None:
        self._groups = found.groups
        self._num_blocks = num_blocks - 1  # the null block is nobody's
        self._block_size = block_size
        self._budget = budget
        self._num_seqs = num_seqs

    def exactly(self, length: int) -> float | None:
        """With a fraction; None where sequences keep nothing."""
        needed = memory.blocks_for(self._groups, length, self._block_size, self._budget)
        return max(self._num_blocks, 0) / needed if needed else None

    def by_length(self, longest: int) -> dict[int, int]:
        """Sequences that run at a time, for powers of four up to the longest."""
        lengths = [n for n in (1024, 4096, 16384, 65536, 262144) if n < longest]
        counts = {n: self.exactly(n) for n in (*lengths, longest)}
        return {
            n: self._num_seqs if count is None else min(int(count), self._num_seqs)
            for n, count in counts.items()
        }


def _remedies(
    config: EngineConfig,
    folder: Path,
    plugins: pluggy.PluginManager,
    found: Survey,
    plan: Plan,
    gpu: Gpu | None,
    usage: Usage,
) -> tuple[Remedy, ...]:
    """Single changes with which a start would succeed, and the least GPU that needs none."""
    tried: list[tuple[str, EngineConfig, Survey]] = []
    length = plan.longest_that_fits
    if length >= 1 and plan.weight_bytes <= plan.requested_bytes:
        model = replace(config.model, max_model_len=length)
        tried.append((f"--max-model-len {length}", replace(config, model=model), found))
    tried += _smaller_caches(config, folder, plugins, found, on_gpu=gpu is not None)
    if found.quantization == "none" and found.dtype.itemsize > 1:
        model = replace(config.model, quantization=ON_LOAD)
        smaller = replace(config, model=model)
        try:
            small = survey(smaller, folder, plugins, on_gpu=gpu is not None)
        except PagedcoreError:  # the plugin is not installed, or the model has a format already
            pass
        else:
            both = replace(smaller, model=replace(model, max_model_len=-1))
            tried.append((f"--quantization {ON_LOAD}", smaller, small))
            tried.append((f"--quantization {ON_LOAD} --max-model-len auto", both, small))
    remedies = []
    for change, changed, of_model in tried:
        then, _ = share_out(changed, of_model, gpu, usage)
        if then.fits:
            remedies.append(Remedy(change=change, result=_result(then)))
    if gpu is not None and config.cache.kv_cache_memory_bytes is None:
        remedies.append(_larger_gpu(plan, found))
    return tuple(remedies)


def _smaller_caches(
    config: EngineConfig,
    folder: Path,
    plugins: pluggy.PluginManager,
    found: Survey,
    *,
    on_gpu: bool,
) -> Iterator[tuple[str, EngineConfig, Survey]]:
    """The start in the formats of 8 bits that take less than the one that was asked for."""
    for name in SMALL_CACHES:
        changed = replace(config, cache=replace(config.cache, kv_cache_dtype=name))
        try:
            other = survey(changed, folder, plugins, on_gpu=on_gpu)
        except PagedcoreError:  # not for this model, or not on this backend
            continue
        sizes = (
            memory.bytes_per_block(each.groups, 1, each.kv_format.vector_bytes)
            for each in (other, found)
        )
        if next(sizes) < next(sizes):
            yield f"--kv-cache-dtype {name}", changed, other


def _result(plan: Plan) -> str:
    count = plan.concurrency_by_length[plan.max_model_len]
    return f"{plan.num_blocks} blocks: {count} sequences of {plan.max_model_len} tokens at a time"


def _larger_gpu(plan: Plan, found: Survey) -> Remedy:
    needed = memory.blocks_for(
        found.groups, plan.max_model_len, plan.block_size, plan.max_num_batched_tokens
    )
    cache = (needed + 1) * plan.block_bytes
    least = plan.weight_bytes + plan.step_bytes + plan.outside_bytes + cache
    total = least * plan.total_bytes / plan.requested_bytes
    return Remedy(
        change=f"a GPU of {memory.in_gib(int(total))} GiB or more",
        result=f"one sequence of {plan.max_model_len} tokens",
    )


def _row_bytes(num_seqs: int, length: int, num_groups: int, block_size: int) -> int:
    """As `DeviceState` allocates them: int32, and a row more for padding."""
    blocks = -(-(length + 1) // block_size)
    return 4 * (num_seqs + 1) * (length + 1 + num_groups * blocks)


def _groups(found: Survey) -> tuple[GroupPlan, ...]:
    return tuple(
        GroupPlan(
            num_layers=len(group.layers),
            num_kv_heads=group.spec.num_kv_heads,
            head_dim=group.spec.head_dim,
            window=group.spec.window,
            is_latent=group.spec.latent,
            bytes_per_token=len(group.layers)
            * group.spec.bytes_per_block(1, found.kv_format.vector_bytes),
        )
        for group in found.groups
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
