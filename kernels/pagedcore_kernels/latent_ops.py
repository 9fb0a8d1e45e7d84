"""The operations of TritonOps on latent vectors (MLA): which kernel answers which tokens.

T tokens   H query heads   D elements of a latent vector
"""

import torch
from torch import Tensor

from pagedcore.execution.ops import LayerCache, Ops, RopeTable, StepBatch
from pagedcore_kernels import latent_cache
from pagedcore_kernels.extend_plan import num_parts
from pagedcore_kernels.fallback import with_fallback
from pagedcore_kernels.latent_decode import (
    MOST_HEADS,
    choose_latent_decode,
    heads_together,
    latent_decode,
)
from pagedcore_kernels.latent_extend import choose_latent_extend, latent_extend
from pagedcore_kernels.step_lists import shared_tile_list, shared_work_list


class LatentOps:
    """The part of a backend that attends to latent vectors, in caches [N, 1, B, D]."""

    replaced: set[str]
    plain: Ops
    supports_graphs: bool
    _num_sms: int
    _shared_memory: int

    @with_fallback
    def latent_to_cache(
        self,
        query: Tensor,
        unturned: Tensor,
        latent: Tensor,
        rope: RopeTable,
        norm_weight: Tensor,
        eps: float,
        cache: LayerCache,
        batch: StepBatch,
    ) -> None:
        """See `Ops.latent_to_cache`."""
        latent_cache.latent_to_cache(
            query,
            unturned,
            latent,
            rope,
            norm_weight,
            eps,
            cache.key,
            batch.positions,
            batch.slots[cache.group],
        )

    @with_fallback
    def latent_attention(
        self, query: Tensor, num_values: int, scale: float, cache: LayerCache, batch: StepBatch
    ) -> Tensor:
        """See `Ops.latent_attention`."""
        num_tokens, num_heads, size = query.shape
        num_single = batch.num_single
        out = torch.empty(
            (num_tokens, num_heads, num_values), dtype=query.dtype, device=query.device
        )
        if num_single:
            decode = choose_latent_decode(
                size, query.dtype, num_heads, cache.block_size, self._shared_memory
            )
            groups = num_heads // heads_together(num_heads)
            latent_decode(
                query[:num_single],
                scale,
                cache.key,
                shared_work_list(cache, batch, groups, self._num_sms, decode),
                out[:num_single],
                decode,
            )
        if num_single < len(batch.rows):
            extend = choose_latent_extend(size, query.dtype, cache.block_size, self._shared_memory)
            heads = heads_together(num_heads, min(extend.queries, MOST_HEADS))
            latent_extend(
                query,
                scale,
                cache.key,
                batch.block_tables[cache.group],
                batch.query_start[num_single:],
                batch.rows[num_single:],
                batch.context_len[num_single:],
                shared_tile_list(extend.queries // heads, num_tokens, batch),
                out,
                first_token=num_single,
                parts=num_parts(
                    num_tokens - num_single,
                    num_heads,
                    num_heads // heads,
                    batch.max_context_len,
                    self._num_sms,
                    extend,
                ),
                config=extend,
            )
        return out
