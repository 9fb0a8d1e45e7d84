"""Allocate the caches of all layers, and measure what else a step needs."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from pagedcore.cache_spec import CacheGroup
from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError
from pagedcore.execution import memory
from pagedcore.execution.batch import profile_batch
from pagedcore.execution.kv_formats import KVFormat
from pagedcore.execution.model import Model
from pagedcore.execution.ops import LayerCache, Ops, SamplingTensors


class CacheMaker:
    """Allocates the caches of all layers; layers of different groups share buffers (MEM-5)."""

    def __init__(
        self,
        ops: Ops,
        groups: tuple[CacheGroup, ...],
        num_layers: int,
        config: EngineConfig,
        kv_format: KVFormat,
        device: torch.device,
    ) -> None:
        """Raises ConfigError for a format that the backend or the layers cannot take."""
        assert config.cache.block_size is not None
        self.block_size = config.cache.block_size
        self.block_bytes = memory.bytes_per_block(groups, self.block_size, kv_format.vector_bytes)
        self._ops = ops
        self.groups = groups
        self._num_layers = num_layers
        self._format = kv_format
        self._device = device
        check_format(ops, groups, kv_format)

    def __call__(self, num_blocks: int) -> list[LayerCache | None]:
        """One entry per layer, of `num_blocks` blocks each."""
        caches: list[LayerCache | None] = [None] * self._num_layers
        buffers: dict[tuple[object, int], LayerCache] = {}
        for number, group in enumerate(self.groups):
            for index, layer in enumerate(group.layers):
                key = (memory.buffer_key(group.spec), index)
                if key in buffers:
                    caches[layer] = replace(buffers[key], spec=group.spec, group=number)
                    continue
                caches[layer] = buffers[key] = self._ops.new_cache(
                    group.spec, number, num_blocks, self.block_size, self._format, self._device
                )
        return caches


def check_format(ops: Ops, groups: Iterable[CacheGroup], kv_format: KVFormat) -> None:
    """Raise ConfigError for a format that a backend has no kernels for, or the layers no use."""
    for group in groups:
        if group.spec.latent and not kv_format.takes_latent:
            raise ConfigError(
                f"the KV cache format {kv_format.name!r} is not for models that keep latent "
                "vectors (MLA): one scale for their two parts would lose the smaller one. Choose "
                "kv_cache_dtype='fp8', or 'auto'"
            )
        ops.new_cache(group.spec, 0, 1, 1, kv_format, torch.device("meta"))


@torch.inference_mode()
def profile(
    model: Model, ops: Ops, make: CacheMaker, config: EngineConfig, device: torch.device
) -> int:
    """Peak bytes of this process's allocator in the largest step, weights included (MEM-2)."""
    num_tokens, num_seqs = config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs
    length = config.model.max_model_len
    assert num_tokens is not None
    assert num_seqs is not None
    assert length is not None
    torch.cuda.reset_peak_memory_stats(device)
    longest = min(length, num_tokens)
    entries = -(-longest // make.block_size)
    tables = torch.zeros(len(make.groups), 1, entries, dtype=torch.int32, device=device)
    token_ids, batch = profile_batch(num_tokens, longest, tables, device)
    ops.begin_step(batch)
    hidden = model.forward(token_ids, batch, make(2))
    if make.groups:  # else it draws no tokens
        _draw(model, ops, hidden[:1].expand(num_seqs, -1).contiguous())
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del hidden, batch, token_ids
    torch.cuda.empty_cache()
    return peak


def _draw(model: Model, ops: Ops, hidden: Tensor) -> None:
    """Draw a token after each of hidden [S, h], in the way that takes most memory."""
    zeros = torch.zeros(len(hidden), device=hidden.device)
    sampling = SamplingTensors(
        temperature=zeros + 1,
        min_p=zeros,
        top_k=zeros.int() + 50,
        top_p=zeros + 0.9,
        uniform=zeros + 0.5,
        all_greedy=False,
        any_filter=True,
    )
    ops.sample(model.logits(hidden), sampling)
