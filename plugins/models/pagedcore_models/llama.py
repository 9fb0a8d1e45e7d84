"""Llama: pre-norm layers of grouped-query attention with rotary positions, and a gated MLP."""

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, DecoderLayer, GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore_models.decoder import Decoder, DecoderSizes


class LlamaForCausalLM(Decoder):
    """Llama 2 and 3, and what is built like them."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(build.config)
        fields = ConfigFields(build.config)
        attention_bias = fields.flag("attention_bias", False)
        mlp_bias = fields.flag("mlp_bias", False)
        rope = sizes.rope(build)

        def layer(prefix: str) -> DecoderLayer:
            attention = Attention(
                build,
                f"{prefix}.self_attn",
                sizes.h,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                rope=rope,
                qkv_bias=attention_bias,
                output_bias=attention_bias,
            )
            mlp = GatedMLP(build, f"{prefix}.mlp", sizes.h, sizes.mlp_width, bias=mlp_bias)
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, mlp)

        layers = [layer(f"model.layers.{i}") for i in range(sizes.num_layers)]
        super().__init__(build, sizes, layers)
