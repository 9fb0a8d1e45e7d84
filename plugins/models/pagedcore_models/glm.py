"""GLM-4: a Llama with fused MLPs that turns half of each head; Glm4 norms what its parts return."""

from dataclasses import replace

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, DecoderLayer, GatedMLP, RMSNorm
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.rope import make_rope
from pagedcore_models.decoder import Decoder, DecoderSizes


class GlmForCausalLM(Decoder):
    """GLM-4-9B of 2024."""

    norms_after: tuple[str, str] | None = None
    """Norms of what attention and MLP return."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(build.config, head_dim=128, eps=("rms_norm_eps", 1.5625e-7))
        attention_bias = ConfigFields(build.config).flag("attention_bias", True)
        rope = make_rope(
            {"partial_rotary_factor": 0.5, **build.config},
            head_dim=sizes.head_dim,
            max_positions=build.max_positions,
            device=build.device,
        )
        rope = replace(rope, interleaved=True)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(build, name, sizes.h, sizes.eps)

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
            )
            mlp = GatedMLP(build, f"{prefix}.mlp", sizes.h, sizes.mlp_width, names=["gate_up_proj"])
            then = None
            if self.norms_after is not None:
                first, second = self.norms_after
                then = norm(f"{prefix}.{first}"), norm(f"{prefix}.{second}")
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, mlp, then=then)

        layers = [layer(f"model.layers.{i}") for i in range(sizes.num_layers)]
        super().__init__(build, sizes, layers)


class Glm4ForCausalLM(GlmForCausalLM):
    """GLM-4-0414 and GLM-Z1."""

    norms_after = ("post_self_attn_layernorm", "post_mlp_layernorm")
