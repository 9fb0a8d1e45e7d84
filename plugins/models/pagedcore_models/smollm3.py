"""SmolLM3: a Llama in which every fourth layer does not know where a token stands."""

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import GATES, Attention, DecoderLayer, GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore_models.decoder import Decoder, DecoderSizes, sliding_layers


class SmolLM3ForCausalLM(Decoder):
    """SmolLM3 3B."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(build.config, tied=True, activations=GATES)
        fields = ConfigFields(build.config)
        attention_bias = fields.flag("attention_bias", False)
        mlp_bias = fields.flag("mlp_bias", False)
        rope = sizes.rope(build, theta=2e6)
        turns = _turns(fields, sizes.num_layers)
        windows = _windows(fields, turns)

        def layer(index: int) -> DecoderLayer:
            prefix = f"model.layers.{index}"
            attention = Attention(
                build,
                f"{prefix}.self_attn",
                sizes.h,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                rope=rope if turns[index] else None,
                qkv_bias=attention_bias,
                output_bias=attention_bias,
                window=windows[index],
            )
            mlp = GatedMLP(
                build,
                f"{prefix}.mlp",
                sizes.h,
                sizes.mlp_width,
                bias=mlp_bias,
                activation=sizes.activation,
            )
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, mlp)

        super().__init__(build, sizes, [layer(i) for i in range(sizes.num_layers)])


def _turns(fields: ConfigFields, num_layers: int) -> list[bool]:
    """Which layers turn queries and keys: `no_rope_layers`, despite its name, is 1 for those."""
    listed = fields.sizes("no_rope_layers")
    if not listed:
        interval = fields.size("no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(listed) < num_layers or max(listed) > 1:
        raise fields.error("no_rope_layers", f"must hold 0 or 1 for each of {num_layers} layers")
    return [turn == 1 for turn in listed[:num_layers]]


def _windows(fields: ConfigFields, turns: list[bool]) -> list[int | None]:
    """How far each layer looks back; where there are windows, layers that turn have none."""
    if not fields.flag("use_sliding_window", False) or not fields.has("sliding_window"):
        return [None] * len(turns)
    window = fields.size("sliding_window")
    has_window = sliding_layers(fields, len(turns)) or [not turn for turn in turns]
    return [window if has else None for has in has_window]
