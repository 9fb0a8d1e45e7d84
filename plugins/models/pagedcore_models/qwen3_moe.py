"""Qwen3-MoE: a Qwen3 in which a mixture of experts takes the place of most layers' MLPs."""

from dataclasses import dataclass
from typing import Self

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, DecoderLayer, FeedForward, GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.moe_layers import SparseMoE
from pagedcore_models.decoder import Decoder, DecoderSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSizes:
    """Fields about the experts."""

    num_experts: int
    num_chosen: int
    width: int
    normalize: bool
    every: int
    """Layers from one mixture to the next."""

    without: frozenset[int]
    """Layers that have an MLP all the same."""

    def is_at(self, index: int) -> bool:
        """Whether layer `index` mixes experts."""
        return index not in self.without and (index + 1) % self.every == 0

    @classmethod
    def read(cls, fields: ConfigFields) -> Self:
        """Raises ModelError, naming the field, for sizes that no mixture can have."""
        name = "num_experts" if fields.has("num_experts") else "num_local_experts"
        num_experts = fields.size(name)
        num_chosen = fields.size("num_experts_per_tok")
        if num_chosen > num_experts:
            raise fields.error("num_experts_per_tok", f"must be at most {name}, {num_experts}")
        return cls(
            num_experts=num_experts,
            num_chosen=num_chosen,
            width=fields.size("moe_intermediate_size"),
            normalize=fields.flag("norm_topk_prob", False),
            every=fields.size("decoder_sparse_step", 1),
            without=frozenset(fields.sizes("mlp_only_layers")),
        )


class Qwen3MoeForCausalLM(Decoder):
    """Qwen3-30B-A3B, Qwen3-235B-A22B and the Coder models of this kind."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        sizes = DecoderSizes.read(build.config)
        mixture = MixtureSizes.read(fields)
        attention_bias = fields.flag("attention_bias", False)
        has_window = fields.flag("use_sliding_window", False) and fields.has("sliding_window")
        window = fields.size("sliding_window") if has_window else None
        rope = sizes.rope(build)

        def feed_forward(prefix: str, index: int) -> FeedForward:
            if not mixture.is_at(index):
                return GatedMLP(build, prefix, sizes.h, sizes.mlp_width)
            return SparseMoE(
                build,
                prefix,
                sizes.h,
                mixture.width,
                num_experts=mixture.num_experts,
                num_chosen=mixture.num_chosen,
                normalize=mixture.normalize,
            )

        def layer(prefix: str, index: int) -> DecoderLayer:
            attention = Attention(
                build,
                f"{prefix}.self_attn",
                sizes.h,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                rope=rope,
                qk_norm_eps=sizes.eps,
                qkv_bias=attention_bias,
                output_bias=attention_bias,
                window=window,
            )
            rest = feed_forward(f"{prefix}.mlp", index)
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, rest)

        layers = [layer(f"model.layers.{i}", i) for i in range(sizes.num_layers)]
        super().__init__(build, sizes, layers)
