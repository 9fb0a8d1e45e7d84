"""Latent attention (MLA) in plain torch, over the same plan as `torch_attention`.

    T tokens   S sequences of one token   Q queries of a longer one   H query heads   L positions
    D elements of a latent vector, of which the first V are mixed and the last R turn

    query   [T, H, D]
    store   [N, B, 1, D]        one vector for each slot
    out     [T, H, V]

To attention the H heads of a token are as many queries of one kv head, whose keys are the latent
vectors, and whose values are the first part of them.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pagedcore.execution.ops import LayerCache, RopeTable, StepBatch
from pagedcore.execution.torch_attention import Plan, gather, tiles
from pagedcore.execution.torch_shared import (
    angles,
    normed,
    once,
    rotate,
    shared_plan,
    write_slots,
)


class TorchLatentOps:
    """The operations on latent vectors, for `TorchOps`."""

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
        num_normed = len(norm_weight)
        by = once(batch, id(rope), lambda: angles(rope, batch))
        query[..., num_normed:] = rotate(unturned.float(), rope, *by)
        wide = latent.float()
        rows = torch.empty(latent.shape, dtype=latent.dtype, device=latent.device)
        rows[:, :num_normed] = normed(wide[:, :num_normed], norm_weight, eps)
        rows[:, num_normed:] = rotate(wide[:, None, num_normed:], rope, *by)[:, 0]
        write_slots(rows[:, None], cache, batch)

    def latent_attention(
        self, query: Tensor, num_values: int, scale: float, cache: LayerCache, batch: StepBatch
    ) -> Tensor:
        """See `Ops.latent_attention`."""
        return attend_latent(
            query, num_values, scale, cache, shared_plan(batch, cache, query.dtype)
        )


def attend_latent(
    query: Tensor, num_values: int, scale: float, cache: LayerCache, plan: Plan
) -> Tensor:
    """Attention of query [T, H, D]: [T, H, V]."""
    out = query.new_empty(*query.shape[:2], num_values)
    for part in plan.parts:
        own = query[part.tokens, None]  # [S, 1, H, D]
        vectors = gather(cache, part.blocks, query.dtype).view(len(own), -1, 1, own.shape[-1])
        vectors = vectors[:, : part.length].transpose(1, 2)
        mixed = scaled_dot_product_attention(
            own, vectors, vectors[..., :num_values], part.mask, scale=scale
        )
        out[part.tokens] = mixed[:, 0]
    for prompt in plan.prompts:
        vectors = gather(cache, prompt.blocks, query.dtype)[: prompt.length, 0]
        for tile, keys, mask in tiles(prompt, plan, cache.spec.window, query):
            seen = vectors[keys].expand(query.shape[1], -1, -1)  # [H, L, D]
            mixed = scaled_dot_product_attention(
                query[tile].transpose(0, 1), seen, seen[..., :num_values], mask, scale=scale
            )
            out[tile] = mixed.transpose(0, 1)
    return out
