"""Qwen3: a Llama with norms on the heads of queries and keys; some layers may have windows."""

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, DecoderLayer, GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore_models.decoder import Decoder, DecoderSizes, windows


class Qwen3ForCausalLM(Decoder):
    """Qwen3, the dense ones."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(build.config, head_dim=128)
        attention_bias = ConfigFields(build.config).flag("attention_bias", False)
        rope = sizes.rope(build)

        def layer(prefix: str, window: int | None) -> DecoderLayer:
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
            mlp = GatedMLP(build, f"{prefix}.mlp", sizes.h, sizes.mlp_width)
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, mlp)

        layers = [
            layer(f"model.layers.{i}", window)
            for i, window in enumerate(windows(build.config, sizes.num_layers))
        ]
        super().__init__(build, sizes, layers)
