"""Phi-3 and Phi-4: a Llama whose matrices are stored fused, with rotary factors for long texts."""

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import GATES, Attention, DecoderLayer, GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore_models.decoder import Decoder, DecoderSizes


class Phi3ForCausalLM(Decoder):
    """Phi-3, Phi-3.5, Phi-4 and Phi-4-mini; Phi-4-mini turns a part of each head only.

    Where there are two lists of rotary factors, `max_model_len` chooses: see `make_rope`.
    """

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(build.config, eps=("rms_norm_eps", 1e-5), activations=GATES)
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
                qkv_names=["qkv_proj"],
            )
            mlp = GatedMLP(
                build,
                f"{prefix}.mlp",
                sizes.h,
                sizes.mlp_width,
                names=["gate_up_proj"],
                activation=sizes.activation,
            )
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, mlp)

        layers = [layer(f"model.layers.{i}") for i in range(sizes.num_layers)]
        super().__init__(build, sizes, layers)
