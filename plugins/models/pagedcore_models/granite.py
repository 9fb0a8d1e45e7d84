"""Granite 3: a Llama with multipliers on embeddings, attention, each part's output, and scores."""

from torch import Tensor

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import GATES, Attention, DecoderLayer, GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore_models.decoder import Decoder, DecoderSizes


class GraniteForCausalLM(Decoder):
    """Granite 3.0 to 3.3, the dense ones."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(build.config, activations=GATES)
        fields = ConfigFields(build.config)
        attention_bias = fields.flag("attention_bias", False)
        mlp_bias = fields.flag("mlp_bias", False)
        attention_multiplier = fields.number("attention_multiplier", 1.0)
        residual_multiplier = fields.number("residual_multiplier", 1.0)
        embedding_multiplier = fields.number("embedding_multiplier", 1.0)
        self._score_multiplier = 1 / fields.number("logits_scaling", 1.0)
        rope = sizes.rope(build)

        def scaled(x: Tensor) -> Tensor:
            return x.mul_(residual_multiplier)

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
                scale=attention_multiplier,
            )
            mlp = GatedMLP(
                build,
                f"{prefix}.mlp",
                sizes.h,
                sizes.mlp_width,
                bias=mlp_bias,
                activation=sizes.activation,
            )
            then = None if residual_multiplier == 1.0 else (scaled, scaled)
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, mlp, then=then)

        layers = [layer(f"model.layers.{i}") for i in range(sizes.num_layers)]
        super().__init__(build, sizes, layers, embedding_scale=embedding_multiplier)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`. Scaling h numbers of a row is less work than scaling V."""
        return super().logits(hidden * self._score_multiplier)
