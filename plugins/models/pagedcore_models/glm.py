"""GLM-4: a Llama with fused MLPs that turns half of each head; Glm4 norms what its parts return."""

from dataclasses import replace

from torch import Tensor

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, DecoderLayer, GatedMLP, RMSNorm
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import LayerCache, StepBatch
from pagedcore.execution.rope import make_rope
from pagedcore_models.decoder import Decoder, DecoderSizes


class SandwichLayer:
    """Attention, then an MLP; each between two norms, and added to what it was given."""

    def __init__(
        self,
        build: ModelBuild,
        prefix: str,
        h: int,
        eps: float,
        attention: Attention,
        feed_forward: GatedMLP,
    ) -> None:
        self.cache_spec = attention.cache_spec
        self._before_attention = RMSNorm(build, f"{prefix}.input_layernorm", h, eps)
        self._attention = attention
        self._after_attention = RMSNorm(build, f"{prefix}.post_self_attn_layernorm", h, eps)
        self._before_mlp = RMSNorm(build, f"{prefix}.post_attention_layernorm", h, eps)
        self._mlp = feed_forward
        self._after_mlp = RMSNorm(build, f"{prefix}.post_mlp_layernorm", h, eps)

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: StepBatch, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """x and residual [T, h] to the same, of which the sum is the stream; None is a zero."""
        assert cache is not None, "attention keeps a cache"
        if residual is None:
            normed, residual = self._before_attention(x), x
        else:
            normed, residual = self._before_attention.add(x, residual)
        x = self._after_attention(self._attention(normed, batch, cache))
        normed, residual = self._before_mlp.add(x, residual)
        return self._after_mlp(self._mlp(normed)), residual


class GlmForCausalLM(Decoder):
    """GLM-4-9B of 2024."""

    layer_class: type[DecoderLayer] | type[SandwichLayer] = DecoderLayer

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

        def layer(prefix: str) -> DecoderLayer | SandwichLayer:
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
            return self.layer_class(build, prefix, sizes.h, sizes.eps, attention, mlp)

        layers = [layer(f"model.layers.{i}") for i in range(sizes.num_layers)]
        super().__init__(build, sizes, layers)


class Glm4ForCausalLM(GlmForCausalLM):
    """GLM-4-0414 and GLM-Z1."""

    layer_class = SandwichLayer
