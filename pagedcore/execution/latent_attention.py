"""Attention that keeps one latent vector for each position (MLA, DeepSeek).

    T tokens   h hidden size   H query heads
    V elements of the latent vector without a position, and R that turn   D = V + R

Keys and values of a head would be products of the V elements. Here the product for keys is taken
into the query, and the one for values into what attention returns: so the cache holds D elements
for each position, however many heads there are, and every rank that has some of the heads has them.
"""

import torch
from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.layers import Linear, RMSNorm
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import LayerCache, RopeTable, StepBatch
from pagedcore.execution.quantized import Activations

NORM_EPS = 1e-6
"""Of the norms inside: config.json has none for them."""


class LatentAttention:
    """Causal self-attention over a paged cache of latent vectors."""

    def __init__(
        self,
        build: ModelBuild,
        prefix: str,
        h: int,
        *,
        num_heads: int,
        query_rank: int | None,
        num_values: int,
        unturned_dim: int,
        value_dim: int,
        rope: RopeTable,
        scale: float,
        bias: bool = False,
    ) -> None:
        """V is `num_values`, and the rotary table has R columns.

        A head's query has `unturned_dim` + R elements, and its output `value_dim`. `query_rank`
        None means that queries are one product of x, not two with a norm between them. `bias` is
        that of the products on both ends; with it there must be a `query_rank`.
        """
        assert query_rank is not None or not bias, "queries that are one product have no bias"
        heads, _ = build.shard.heads(prefix, num_heads, num_heads)
        all_heads, num_heads = num_heads, heads.own
        turned_dim = rope.cos_sin.shape[1]
        size = num_values + turned_dim
        self.cache_spec = CacheSpec(num_kv_heads=1, head_dim=size, latent=True)
        self._ops = build.ops
        self._num_heads = num_heads
        self._num_values, self._unturned_dim = num_values, unturned_dim
        self._scale = scale
        self._rope = rope
        query = heads.times(unturned_dim + turned_dim)
        self._query_norm: RMSNorm | None = None
        self._query: Linear | None = None
        first_share = query if query_rank is None else build.shard.all_of(query_rank)
        shares = [first_share, build.shard.all_of(size)]
        self._widths = [share.own for share in shares]
        first = "q_proj" if query_rank is None else "q_a_proj"
        names = [f"{prefix}.{first}", f"{prefix}.kv_a_proj_with_mqa"]
        build.weights.ignore(f"{prefix}.rotary_emb.")  # frequencies that old checkpoints hold
        rows = [share.whole for share in shares]
        self._down = Linear(build, names, h, rows, bias=bias, dim=0, shares=shares)
        if query_rank is not None:
            self._query_norm = RMSNorm(build, f"{prefix}.q_a_layernorm", query_rank, NORM_EPS)
            self._query = Linear(build, [f"{prefix}.q_b_proj"], query_rank, [query.whole], dim=0)
        self._norm_weight = build.weights.take(f"{prefix}.kv_a_layernorm.weight", (num_values,))
        up = Linear(
            build,
            [f"{prefix}.kv_b_proj"],
            num_values,
            [all_heads * (unturned_dim + value_dim)],
            dim=0,
        )
        self._output = Linear(
            build, [f"{prefix}.o_proj"], all_heads * value_dim, [h], bias=bias, dim=1
        )
        self._value_dim = value_dim
        self._key_up = torch.empty(num_heads, unturned_dim, num_values, device="meta")
        self._value_up = torch.empty(num_heads, num_values, value_dim, device="meta")
        if build.device.type != "meta":
            # However the matrix is stored, products with unit vectors are its columns.
            columns = up(torch.eye(num_values, dtype=build.dtype, device=build.device))
            parts = columns.view(num_values, num_heads, -1).split([unturned_dim, value_dim], -1)
            self._key_up = parts[0].permute(1, 2, 0).contiguous()
            self._value_up = parts[1].transpose(0, 1).contiguous()

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `Consumer.wants_quantized`."""
        return self._down.wants_quantized(num_tokens, dtype)

    def __call__(self, x: Activations, batch: StepBatch, cache: LayerCache) -> Tensor:
        """x [T, h] to [T, h]; the step's latent vectors are left in the cache."""
        wide, latent = self._down(x).split(self._widths, 1)
        if self._query is not None and self._query_norm is not None:
            wide = self._query(self._query_norm(wide))
        heads = wide.unflatten(1, (self._num_heads, -1))
        num_tokens, num_values = len(latent), self._num_values
        query = latent.new_empty(num_tokens, self._num_heads, latent.shape[1])
        torch.bmm(
            heads[..., : self._unturned_dim].transpose(0, 1),
            self._key_up,
            out=query[..., :num_values].transpose(0, 1),
        )
        self._ops.latent_to_cache(
            query,
            heads[..., self._unturned_dim :],
            latent,
            self._rope,
            self._norm_weight,
            NORM_EPS,
            cache,
            batch,
        )
        mixed = self._ops.latent_attention(query, num_values, self._scale, cache, batch)
        out = mixed.new_empty(num_tokens, self._num_heads, self._value_dim)
        torch.bmm(mixed.transpose(0, 1), self._value_up, out=out.transpose(0, 1))
        return self._output(out.flatten(1))
