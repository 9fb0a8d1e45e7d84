"""Lists of work that the layers of a step share: made by the first layer that asks.

T tokens   P programs
"""

from typing import Any

from torch import Tensor

from pagedcore.execution.ops import LayerCache, StepBatch
from pagedcore_kernels.decode_attention import DecodeConfig
from pagedcore_kernels.extend_plan import build_tile_list
from pagedcore_kernels.work_list import WorkList, build_work_list


def shared_work_list(
    cache: LayerCache, batch: StepBatch, num_heads: int, num_sms: int, config: DecodeConfig
) -> WorkList:
    """Shares of the step's single tokens for each of `num_heads`: one list for a cache group."""
    shared: dict[Any, Any] = {} if batch.shared is None else batch.shared
    window = cache.spec.window
    key = ("work list", cache.group, num_heads, window, config)
    if key not in shared:
        shared[key] = build_work_list(
            batch.context_len[: batch.num_single],
            batch.rows[: batch.num_single],
            batch.block_tables[cache.group],
            num_kv_heads=num_heads,
            block_size=cache.block_size,
            tile=config.tile,
            window=window,
            max_context_len=batch.max_context_len,
            programs=max(num_sms * config.programs_per_sm // num_heads, 1),
            min_share=config.min_share,
        )
    work: WorkList = shared[key]
    return work


def shared_tile_list(tokens: int, num_tokens: int, batch: StepBatch) -> Tensor:
    """Runs of `tokens` in the step's longer sequences: [P, 2], see `build_tile_list`."""
    shared: dict[Any, Any] = {} if batch.shared is None else batch.shared
    key = ("tile list", tokens)
    if key not in shared:
        query_start = batch.query_start[batch.num_single :]
        shared[key] = build_tile_list(query_start, num_tokens - batch.num_single, tokens)
    tiles: Tensor = shared[key]
    return tiles
