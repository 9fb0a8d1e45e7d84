"""GPT-OSS: sinks in attention, windows on every other layer, and clamped experts with biases."""

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.expert_ops import Clamp
from pagedcore.execution.layers import Attention, DecoderLayer
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.moe_layers import StackedMoE
from pagedcore_models.decoder import Decoder, DecoderSizes, sliding_layers


class GptOssForCausalLM(Decoder):
    """gpt-oss-20b and gpt-oss-120b."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        sizes = DecoderSizes.read(build.config, head_dim=64, eps=("rms_norm_eps", 1e-5))
        num_experts = fields.size("num_local_experts")
        num_chosen = fields.size("num_experts_per_tok", 4)
        if num_chosen > num_experts:
            raise fields.error(
                "num_experts_per_tok", f"must be at most num_local_experts, {num_experts}"
            )
        bias = fields.flag("attention_bias", True)
        clamp = Clamp(fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0))
        window = fields.size("sliding_window") if fields.has("sliding_window") else None
        has_window = sliding_layers(fields, sizes.num_layers)
        if has_window is None:
            has_window = [i % 2 == 0 for i in range(sizes.num_layers)]
        rope = sizes.rope(build, theta=150000.0)

        def layer(prefix: str, has_window: bool) -> DecoderLayer:
            attention = Attention(
                build,
                f"{prefix}.self_attn",
                sizes.h,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                rope=rope,
                qkv_bias=bias,
                output_bias=bias,
                window=window if has_window else None,
                has_sinks=True,
            )
            mixture = StackedMoE(
                build,
                f"{prefix}.mlp",
                sizes.h,
                sizes.mlp_width,
                num_experts=num_experts,
                num_chosen=num_chosen,
                clamp=clamp,
            )
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, mixture)

        layers = [layer(f"model.layers.{i}", has) for i, has in enumerate(has_window)]
        super().__init__(build, sizes, layers)
