"""Gemma 2: norms on both sides of each part, capped scores, a window on every other layer."""

from functools import partial

import torch
from torch import Tensor

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, DecoderLayer, GatedMLP, Mixer, RMSNorm
from pagedcore.execution.model import ModelBuild
from pagedcore_models.decoder import Decoder, DecoderSizes, sliding_layers

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "gelu_new", "silu")


class GemmaDecoder(Decoder):
    """A decoder with scaled embeddings, whose scores may be capped."""

    def __init__(self, build: ModelBuild, sizes: DecoderSizes, layers: list[DecoderLayer]) -> None:
        # The root is rounded to the model's type first, as it was while Gemma was trained:
        scale = torch.tensor(sizes.h**0.5, dtype=build.dtype).item()
        super().__init__(build, sizes, layers, embedding_scale=scale, norm_offset=1.0)
        self._ops = build.ops
        fields = ConfigFields(build.config)
        self._cap = fields.number_or_none("final_logit_softcapping", self.default_cap)

    default_cap: float | None = None
    """What scores are capped at, where config.json does not say."""

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        scores = super().logits(hidden)
        return scores if self._cap is None else self._ops.cap_scores(scores, self._cap)


class Gemma2ForCausalLM(GemmaDecoder):
    """Gemma 2: 2B, 9B and 27B."""

    default_cap = 30.0

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        sizes = read_gemma_sizes(build)
        attention_bias = fields.flag("attention_bias", False)
        soft_cap = fields.number_or_none("attn_logit_softcapping", 50.0)
        scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
        window = fields.size("sliding_window", 4096)
        rope = sizes.rope(build)

        def layer(prefix: str, is_sliding: bool) -> DecoderLayer:
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
                window=window if is_sliding else None,
                scale=scale,
                soft_cap=soft_cap,
            )
            return gemma_layer(build, prefix, sizes, attention)

        every_other = [i % 2 == 0 for i in range(sizes.num_layers)]
        kinds = sliding_layers(fields, sizes.num_layers) or every_other
        layers = [layer(f"model.layers.{i}", is_sliding) for i, is_sliding in enumerate(kinds)]
        super().__init__(build, sizes, layers)


def read_gemma_sizes(build: ModelBuild) -> DecoderSizes:
    """Raises ModelError, naming the field, for a Gemma that this is not, such as an encoder."""
    fields = ConfigFields(build.config)
    if fields.flag("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "must be false for a model of texts")
    return DecoderSizes.read(
        build.config,
        head_dim=256,
        tied=True,
        activations=ACTIVATIONS,
        activation_name="hidden_activation",
    )


def gemma_layer(
    build: ModelBuild, prefix: str, sizes: DecoderSizes, attention: Mixer
) -> DecoderLayer:
    """Attention, then an MLP; each between two norms, whose weights are stored less 1."""
    mlp = GatedMLP(build, f"{prefix}.mlp", sizes.h, sizes.mlp_width, activation=sizes.activation)
    norm = partial(RMSNorm, build, size=sizes.h, eps=sizes.eps, offset=1.0)
    return DecoderLayer(
        build,
        prefix,
        sizes.h,
        sizes.eps,
        attention,
        mlp,
        norm_names=("input_layernorm", "pre_feedforward_layernorm"),
        norm_offset=1.0,
        then=(
            norm(f"{prefix}.post_attention_layernorm"),
            norm(f"{prefix}.post_feedforward_layernorm"),
        ),
    )
