"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values; some layers have windows."""

from pagedcore.execution.layers import Attention, DecoderLayer, GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore_models.decoder import Decoder, DecoderSizes, windows


class Qwen2ForCausalLM(Decoder):
    """Qwen2 and Qwen2.5, the dense ones."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(build.config)
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
                qkv_bias=True,
                window=window,
            )
            mlp = GatedMLP(build, f"{prefix}.mlp", sizes.h, sizes.mlp_width)
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, mlp)

        layers = [
            layer(f"model.layers.{i}", window)
            for i, window in enumerate(windows(build.config, sizes.num_layers))
        ]
        super().__init__(build, sizes, layers)
