"""An engine from a configuration: plugins, model folder, executor, scheduler, in this order."""

import time
from dataclasses import replace
from pathlib import Path

import pluggy

from pagedcore.config import EngineConfig, Usage
from pagedcore.engine.adapters import Adapters
from pagedcore.engine.engine import Engine
from pagedcore.engine.info import EngineInfo
from pagedcore.execution.loading import build_executor
from pagedcore.plugins import choose, collect, load_plugins
from pagedcore.scheduling.hashing import check_algorithm
from pagedcore.scheduling.scheduler import Scheduler
from pagedcore.sources import find_model


def build_engine(
    config: EngineConfig,
    *,
    usage: Usage = "offline",
    plugins: pluggy.PluginManager | None = None,
    folder: Path | None = None,
) -> Engine:
    """Find the model, load it and size its cache.

    `plugins` and the model's `folder` are for callers who have found them already. Raises
    ConfigError, ModelError, PluginError or UnknownNameError, before any weight is read where the
    cause can be known by then.
    """
    started = time.perf_counter()
    plugins = plugins or load_plugins(config.execution.disable_plugin, config.execution.only_plugin)
    policy = choose(plugins, "pagedcore_policies", config.scheduler.scheduling_policy)()
    if config.cache.enable_prefix_caching:
        check_algorithm(config.cache.prefix_caching_hash_algo)
    folder = folder or find_model(
        config.model.model,
        collect(plugins, "pagedcore_sources"),
        revision=config.model.revision,
    )
    found = time.perf_counter()
    executor = build_executor(config, folder, plugins, usage)
    config = executor.config
    assert config.scheduler.max_num_seqs is not None
    limits = config.scheduler
    if usage == "offline":  # nobody could retry: everything that is asked for waits (QUEUE-2)
        limits = replace(limits, max_num_queued_reqs=0, max_num_queued_tokens=0)
    is_decoder = bool(executor.groups)  # what keeps nothing of the past must see a prompt whole
    if not is_decoder:
        limits = replace(limits, enable_chunked_prefill=False)
    scheduler = Scheduler(
        limits,
        num_blocks=executor.num_blocks,
        block_size=executor.block_size,
        groups=executor.groups,
        max_model_len=executor.max_model_len,
        enable_prefix_caching=config.cache.enable_prefix_caching and is_decoder,
        hash_algorithm=config.cache.prefix_caching_hash_algo,
        kv_watermark=config.cache.kv_watermark or 0.0,
        policy=policy,
        seed=config.execution.seed,
        max_loras=config.lora.max_loras if executor.adapters is not None else 0,
    )
    info = EngineInfo(
        model=str(folder),
        served_model_names=config.model.served_model_name or (config.model.model,),
        max_model_len=executor.max_model_len,
        vocab_size=executor.vocab_size,
        block_size=executor.block_size,
        num_blocks=executor.num_blocks,
        max_num_seqs=config.scheduler.max_num_seqs,
        task=executor.task,
        pooling=executor.pooling,
        enable_lora=executor.adapters is not None,
        startup_seconds={
            "config": found - started,
            **executor.startup_seconds,
            "total": time.perf_counter() - started,
        },
    )
    return Engine(
        scheduler,
        executor,
        info,
        async_scheduling=config.scheduler.async_scheduling and executor.overlaps,
        plugins=plugins,
        logits_processors=executor.logits_processors,
        adapters=Adapters(
            executor.adapters,
            config.lora,
            info.served_model_names,
            in_use=lambda: scheduler.adapter_keys,
        ),
    )
