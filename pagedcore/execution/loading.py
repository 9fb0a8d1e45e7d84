"""An Executor from a configuration: device, backend, model, cache, in this order.

Whatever can be known to be wrong is found before a weight is read: the model is built on the device
"meta" first, where its weights have shapes and nothing else.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pluggy
import torch

from pagedcore.cache_spec import group_layers
from pagedcore.config import EngineConfig, Usage
from pagedcore.errors import ConfigError, ModelError
from pagedcore.execution import headless, memory
from pagedcore.execution.adapter_store import AdapterStore, build_adapted
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.devices import available_bytes, choose_dtype, find_device, total_bytes
from pagedcore.execution.executor import Executor
from pagedcore.execution.kv_cache import CacheMaker, profile
from pagedcore.execution.kv_formats import choose_kv_format
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.model_choice import choose_model
from pagedcore.execution.model_config import complete_config
from pagedcore.execution.ops import LayerCache, Ops
from pagedcore.execution.pooled_model import longest_prompt, pooling_of, task_of
from pagedcore.execution.quantizer import Quantizer, Unquantized
from pagedcore.execution.random_weights import RandomCheckpoint
from pagedcore.plugins import choose, collect

logger = logging.getLogger(__name__)


def build_executor(
    config: EngineConfig, folder: Path, plugins: pluggy.PluginManager, usage: Usage
) -> Executor:
    """Load a model folder and size its cache.

    Raises ConfigError, ModelError, PluginError or UnknownNameError.
    """
    started = time.perf_counter()
    device = find_device(config.execution.device)
    checkpoint = (
        RandomCheckpoint(folder, config.execution.seed)
        if config.model.load_format == "dummy"
        else Checkpoint(folder)
    )
    is_headless = isinstance(checkpoint, Checkpoint) and headless.complete(checkpoint)
    model_class = choose_model(config.model.model_impl, checkpoint.config, plugins)
    of_model = complete_config(checkpoint.config, model_class)
    quantizer = choose_quantizer(config, of_model, plugins)
    dtype = choose_dtype(config.model.dtype, checkpoint.dtype, device)
    ops = choose_backend(config, device, dtype, plugins)
    kv_format = choose_kv_format(config.cache.kv_cache_dtype, dtype, plugins)
    own_length = longest_context(of_model)
    asked = config.model.max_model_len
    check_asked_length(asked, own_length)
    resolve = partial(
        config.resolve,
        usage=usage,
        device_memory_gib=total_bytes(device) / memory.GIB if device.type == "cuda" else None,
        is_a100=device.type == "cuda" and "A100" in torch.cuda.get_device_name(device),
        block_size=ops.block_size,
    )
    config = resolve(max_model_len=own_length if asked in (None, -1) else asked)
    available = available_bytes(config, device)
    build = ModelBuild(
        config=of_model,
        weights=checkpoint.shapes(dtype),
        quantizer=quantizer,
        ops=ops,
        dtype=dtype,
        device=torch.device("meta"),
        max_positions=config.model.max_model_len or own_length,
    )
    meta = model_class(build)
    checkpoint.check_all_taken()
    pooling = pooling_of(meta, of_model, folder)
    if not group_layers(meta.cache_specs):  # it sees prompts whole
        own_length = longest_prompt(meta, own_length)
        check_asked_length(asked, own_length)
        config = resolve(
            max_model_len=own_length if asked in (None, -1) else asked, chunks_prompts=False
        )
    if isinstance(quantizer, Unquantized):  # others know best what becomes of the bytes
        memory.check_weights_fit(checkpoint.num_bytes, available)
    groups = group_layers(meta.cache_specs)
    make = CacheMaker(ops, groups, len(meta.cache_specs), config, kv_format, device)

    def size_cache(available: int) -> tuple[int, int]:
        """Blocks for `available` bytes, and the longest sequence that is taken."""
        num_blocks = memory.count_blocks(config.cache, available, make.block_bytes)
        budget = config.scheduler.max_num_batched_tokens
        assert budget is not None
        length = memory.check_length(
            asked, own_length, groups, num_blocks, make.block_size, make.block_bytes, budget
        )
        return num_blocks, length

    for_cache = int(config.cache.cpu_kv_cache_gib * memory.GIB)
    if device.type != "cuda" or memory.is_size_given(config.cache):  # known before any weight
        num_blocks, _ = size_cache(for_cache)
        if device.type != "cuda":  # where memory that is not there is noticed late, if at all
            memory.check_cache_fits(num_blocks * make.block_bytes, available)
    weights = checkpoint.tensors(dtype, device)
    build = replace(build, weights=weights, device=device)
    adapters: AdapterStore | None = None
    with torch.inference_mode():
        if config.lora.enable_lora:
            model, adapters = build_adapted(
                model_class, build, config.lora, is_decoder=bool(groups)
            )
        else:
            model = model_class(build)
    weights.finish()
    loaded = time.perf_counter()

    if device.type == "cuda":
        for_cache = available - profile(model, ops, make, config, device) - memory.OUTSIDE_BYTES
    num_blocks, length = size_cache(for_cache)
    return Executor(
        replace(config, model=replace(config.model, max_model_len=length)),
        model,
        ops,
        device=device,
        dtype=dtype,
        caches=_allocate(make, num_blocks),
        logits_processors=collect(plugins, "pagedcore_logits_processors"),
        adapters=adapters,
        groups=groups,
        num_blocks=num_blocks,
        task="embed" if is_headless else task_of(meta),
        pooling=pooling,
        startup_seconds={"weights": loaded - started, "profile": time.perf_counter() - loaded},
    )


def _allocate(make: CacheMaker, num_blocks: int) -> list[LayerCache | None]:
    try:
        return make(num_blocks)
    except RuntimeError as error:  # what torch raises where memory runs out
        size = memory.in_gib(num_blocks * make.block_bytes)
        raise ConfigError(
            f"a cache of {size} GiB cannot be allocated: lower gpu_memory_utilization, "
            "kv_cache_memory_bytes or num_gpu_blocks_override (cpu_kv_cache_gib on the CPU)"
        ) from error


def longest_context(config: Mapping[str, Any]) -> int:
    """Positions that a model was made for, by its config.json; raises ModelError without any."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json: {name} must be a positive integer, not {value!r}")
        return math.floor(value * _stretch(config))
    raise ModelError(
        "config.json does not say how long a context the model takes: "
        "max_position_embeddings is missing"
    )


def _stretch(config: Mapping[str, Any]) -> float:
    """How many times longer rotary scaling makes a context than max_position_embeddings says."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or config.get("rope_local_base_freq"):
        return 1.0  # with two rotary bases, as Gemma 3 has, configs say the scaled length
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = scaling.get("factor")
    if kind not in ("linear", "dynamic", "yarn") or not isinstance(factor, int | float):
        return 1.0  # the others say the scaled length
    original = scaling.get("original_max_position_embeddings")
    if kind == "yarn" and isinstance(original, int):  # some configs say the scaled length
        return max(1.0, original * float(factor) / float(config["max_position_embeddings"]))
    return max(1.0, float(factor))


def check_asked_length(asked: int | None, own: int) -> None:
    """Raise ConfigError for a max_model_len above the model's own."""
    if asked is not None and asked > own:
        raise ConfigError(
            f"max_model_len={asked} is more than the model's own {own}: lower it, or use -1"
        )


def choose_backend(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, plugins: pluggy.PluginManager
) -> Ops:
    """The backend that was asked for, or the best that runs here."""
    name = config.execution.backend
    offered = collect(plugins, "pagedcore_backends")
    if name is None and device.type == "cpu" and dtype == torch.bfloat16 and "native" in offered:
        try:
            native: Ops = offered["native"](str(device))
        except ConfigError as error:
            logger.info("%s; plain torch takes its place", error)
        else:
            return native
    if name is None:
        name = "triton" if device.type == "cuda" and "triton" in offered else "torch"
    ops: Ops = choose(plugins, "pagedcore_backends", name)(str(device))
    return ops


def choose_quantizer(
    config: EngineConfig, of_model: Mapping[str, Any], plugins: pluggy.PluginManager
) -> Quantizer:
    """The weight format that was asked for, or the checkpoint's own."""
    settings = of_model.get("quantization_config") or {}
    if not isinstance(settings, Mapping):
        raise ModelError("config.json: quantization_config must be an object")
    name = config.model.quantization or settings.get("quant_method")
    if name is None and settings:
        raise ModelError("config.json: quantization_config names no quant_method")
    if name is None or (name == "none" and not settings):
        return Unquantized()
    quantizer: Quantizer = choose(plugins, "pagedcore_quantizers", str(name))(settings)
    return quantizer
