"""Mistral: a Llama whose attention looks back over a sliding window, where there is one."""

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, DecoderLayer, GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore_models.decoder import Decoder, DecoderSizes


class MistralForCausalLM(Decoder):
    """Mistral 7B and its successors."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(build.config)
        fields = ConfigFields(build.config)
        window = fields.size("sliding_window") if fields.has("sliding_window") else None
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
                window=window,
            )
            mlp = GatedMLP(build, f"{prefix}.mlp", sizes.h, sizes.mlp_width)
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, mlp)

        layers = [layer(f"model.layers.{i}") for i in range(sizes.num_layers)]
        super().__init__(build, sizes, layers)
