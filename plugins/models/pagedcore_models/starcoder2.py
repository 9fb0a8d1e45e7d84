"""StarCoder2: rotary attention and a plain MLP, with LayerNorms, and biases everywhere."""

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, Embedding, Head
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.plain_layers import ACTIVATIONS, LayerNorm, PlainLayer, PlainMLP
from pagedcore_models.decoder import DecoderSizes
from pagedcore_models.plain_decoder import PlainDecoder


class Starcoder2ForCausalLM(PlainDecoder):
    """StarCoder2 of 3, 7 and 15 billion parameters."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(
            build.config,
            eps=("norm_epsilon", 1e-5),
            tied=True,
            activations=["gelu_pytorch_tanh", *ACTIVATIONS],
        )
        fields = ConfigFields(build.config)
        bias = fields.flag("use_bias", True)
        window = fields.size("sliding_window") if fields.has("sliding_window") else None
        rope = sizes.rope(build)

        def norm(name: str) -> LayerNorm:
            return LayerNorm(build, name, sizes.h, sizes.eps)

        def layer(prefix: str) -> PlainLayer:
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
                window=window,
            )
            mlp = PlainMLP(
                build,
                [f"{prefix}.mlp.c_fc", f"{prefix}.mlp.c_proj"],
                sizes.h,
                sizes.mlp_width,
                activation=sizes.activation,
                bias=bias,
            )
            before_attention = norm(f"{prefix}.input_layernorm")
            before_mlp = norm(f"{prefix}.post_attention_layernorm")
            return PlainLayer(before_attention, attention, before_mlp, mlp)

        embedding = Embedding(build, "model.embed_tokens", sizes.vocab_size, sizes.h)
        tied = embedding if sizes.tied else None
        super().__init__(
            sizes.vocab_size,
            embedding=embedding,
            layers=[layer(f"model.layers.{i}") for i in range(sizes.num_layers)],
            norm=norm("model.norm"),
            head=Head(build, "lm_head", sizes.vocab_size, sizes.h, tied),
        )
