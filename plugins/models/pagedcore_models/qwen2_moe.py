"""Qwen2-MoE: a Qwen2 in which most layers mix experts, and one more MLP that all tokens take."""

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, DecoderLayer, FeedForward, GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.moe_layers import GatedSharedExpert, SparseMoE
from pagedcore_models.decoder import Decoder, DecoderSizes, windows
from pagedcore_models.qwen3_moe import MixtureSizes


class Qwen2MoeForCausalLM(Decoder):
    """Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        sizes = DecoderSizes.read(build.config)
        mixture = MixtureSizes.read(fields)
        shared_width = fields.size("shared_expert_intermediate_size")
        qkv_bias = fields.flag("qkv_bias", True)
        rope = sizes.rope(build)

        def feed_forward(prefix: str, index: int) -> FeedForward:
            if not mixture.is_at(index):
                return GatedMLP(build, prefix, sizes.h, sizes.mlp_width)
            experts = SparseMoE(
                build,
                prefix,
                sizes.h,
                mixture.width,
                num_experts=mixture.num_experts,
                num_chosen=mixture.num_chosen,
                normalize=mixture.normalize,
            )
            return GatedSharedExpert(build, prefix, sizes.h, shared_width, experts)

        def layer(prefix: str, index: int, window: int | None) -> DecoderLayer:
            attention = Attention(
                build,
                f"{prefix}.self_attn",
                sizes.h,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                rope=rope,
                qkv_bias=qkv_bias,
                window=window,
            )
            rest = feed_forward(f"{prefix}.mlp", index)
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, rest)

        layers = [
            layer(f"model.layers.{i}", i, window)
            for i, window in enumerate(windows(build.config, sizes.num_layers))
        ]
        super().__init__(build, sizes, layers)
