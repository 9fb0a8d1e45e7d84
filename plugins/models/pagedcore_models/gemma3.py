"""Gemma 3: a Gemma 2 with norms on the heads, and two rotary bases: for near and for all."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, DecoderLayer
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import RopeTable
from pagedcore.execution.renamed_weights import RenamedWeights
from pagedcore.execution.rope import make_rope
from pagedcore_models.decoder import DecoderSizes, sliding_layers
from pagedcore_models.gemma2 import GemmaDecoder, gemma_layer, read_gemma_sizes


class Gemma3ForCausalLM(GemmaDecoder):
    """Gemma 3 of texts: 270M and 1B."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        sizes = read_gemma_sizes(build)
        attention_bias = fields.flag("attention_bias", False)
        soft_cap = fields.number_or_none("attn_logit_softcapping")
        scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
        window = fields.size("sliding_window", 4096)
        rope_of_all, rope_of_window = _ropes(build, sizes)

        def layer(prefix: str, is_sliding: bool) -> DecoderLayer:
            attention = Attention(
                build,
                f"{prefix}.self_attn",
                sizes.h,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                rope=rope_of_window if is_sliding else rope_of_all,
                qk_norm_eps=sizes.eps,
                qk_norm_offset=1.0,
                qkv_bias=attention_bias,
                output_bias=attention_bias,
                window=window if is_sliding else None,
                scale=scale,
                soft_cap=soft_cap,
            )
            return gemma_layer(build, prefix, sizes, attention)

        pattern = fields.size("sliding_window_pattern", 6)
        all_but_each_last = [(i + 1) % pattern != 0 for i in range(sizes.num_layers)]
        kinds = sliding_layers(fields, sizes.num_layers) or all_but_each_last
        layers = [layer(f"model.layers.{i}", is_sliding) for i, is_sliding in enumerate(kinds)]
        super().__init__(build, sizes, layers)


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The texts of Gemma 3 4B, 12B and 27B, which see images, too."""

    config_defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "rope_local_base_freq": 10000.0,
    }
    """What such a config.json leaves out; see `complete_config`."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        for part in ("vision_tower.", "multi_modal_projector."):
            build.weights.ignore(part)
        names = {"model": "language_model.model", "lm_head": "language_model.lm_head"}
        super().__init__(replace(build, weights=RenamedWeights(build.weights, names)))


def _ropes(build: ModelBuild, sizes: DecoderSizes) -> tuple[RopeTable, RopeTable]:
    """The tables of layers that look at all, and of those with a window.

    A config has settings for each of them, or, before transformers 5, `rope_theta` and
    `rope_scaling` for the former and `rope_local_base_freq` for the latter.
    """
    fields = ConfigFields(build.config)
    of_kinds = fields.section("rope_parameters")
    of_all, of_window = None, None
    scaling, theta, near_theta = None, 1e6, 1e4
    if of_kinds is None:
        scaling = build.config.get("rope_scaling")
        theta = fields.number("rope_theta", theta)
        near_theta = fields.number("rope_local_base_freq", near_theta)
    else:
        of_all, of_window = map(of_kinds.section, ("full_attention", "sliding_attention"))

    def table(settings: ConfigFields | None, scaling: object, theta: float) -> RopeTable:
        own = {
            "rope_parameters": None if settings is None else settings.values,
            "rope_scaling": scaling,
            "rope_theta": theta,
        }
        return make_rope(
            {**build.config, **own},
            head_dim=sizes.head_dim,
            max_positions=build.max_positions,
            device=build.device,
        )

    return table(of_all, scaling, theta), table(of_window, None, near_theta)
