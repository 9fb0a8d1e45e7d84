"""ModernBERT: rotary positions, gated MLPs, and attention that mostly sees a window around."""

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.encoder_layers import ClassifierHead, EncoderAttention, PreNormLayer
from pagedcore.execution.layers import Embedding, Linear
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import Ops, RopeTable, StepBatch
from pagedcore.execution.plain_layers import ACTIVATIONS, LayerNorm
from pagedcore.execution.quantized import Activations
from pagedcore.execution.rope import make_rope
from pagedcore.pooling import Pooling
from pagedcore_models.decoder import sliding_layers
from pagedcore_models.encoder import Encoder, EncoderSizes, num_labels, prefix_of


class ModernBertModel(Encoder):
    """ModernBERT of any size: vectors, and scores where a subclass has a classifier."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        sizes = EncoderSizes.read(build.config, activation_name="hidden_activation")
        if (sizes.h // sizes.num_heads) % 2:
            raise fields.error("num_attention_heads", "must give heads of even size")
        if sizes.activation != "gelu":
            raise fields.error("hidden_activation", "must be gelu")
        eps = fields.number("norm_eps", 1e-5)
        norm_bias = fields.flag("norm_bias", False)
        bias = fields.flag("attention_bias", False)
        window = fields.size("local_attention", 128) // 2
        ropes = {is_local: _rope(build, sizes, is_local) for is_local in (True, False)}
        prefix = prefix_of(build, "model.", "embeddings.tok_embeddings.weight")

        def norm(name: str) -> LayerNorm:
            return LayerNorm(build, name, sizes.h, eps, bias=norm_bias)

        def layer(index: int, is_local: bool) -> PreNormLayer:
            name = f"{prefix}layers.{index}"
            attention = EncoderAttention(
                build,
                [f"{name}.attn.Wqkv"],
                f"{name}.attn.Wo",
                sizes.h,
                sizes.num_heads,
                bias=bias,
                rope=ropes[is_local],
                window=window if is_local else None,
            )
            mlp_bias = fields.flag("mlp_bias", False)
            return PreNormLayer(
                norm(f"{name}.attn_norm") if index else None,
                attention,
                norm(f"{name}.mlp_norm"),
                _GatedMLP(build, f"{name}.mlp", sizes.h, sizes.mlp_width, bias=mlp_bias),
            )

        words = Embedding(build, f"{prefix}embeddings.tok_embeddings", sizes.vocab_size, sizes.h)
        words_norm = norm(f"{prefix}embeddings.norm")

        def embedding(token_ids: Tensor, batch: StepBatch) -> Tensor:
            return words_norm(words(token_ids))

        super().__init__(
            build,
            sizes,
            embedding=embedding,
            layers=[layer(i, is_local) for i, is_local in enumerate(_local_layers(build.config))],
            norm=norm(f"{prefix}final_norm"),
            classifier=self.make_classifier(build, sizes.h, norm),
            scored=_scored(fields),
        )
        for unused in ("head.", "decoder."):
            build.weights.ignore(unused)

    def make_classifier(self, build: ModelBuild, h: int, norm: Any) -> ClassifierHead | None:
        """What gives scores, in a model that has it."""
        return None


class ModernBertForSequenceClassification(ModernBertModel):
    """The same with a classifier."""

    def make_classifier(self, build: ModelBuild, h: int, norm: Any) -> ClassifierHead | None:
        """See `ModernBertModel.make_classifier`."""
        fields = ConfigFields(build.config)
        name = fields.choice("classifier_activation", list(ACTIVATIONS), "gelu")
        return ClassifierHead(
            build,
            h,
            num_labels(build.config),
            inner="head.dense",
            inner_bias=fields.flag("classifier_bias", False),
            activation=ACTIVATIONS[name],
            norm=norm("head.norm"),
            outer="classifier",
        )


class _GatedMLP:
    """Wo(gelu(first half of Wi(x)) * second half)."""

    def __init__(self, build: ModelBuild, prefix: str, h: int, width: int, *, bias: bool) -> None:
        self._ops: Ops = build.ops
        self._up = Linear(build, [f"{prefix}.Wi"], h, [2 * width], bias=bias, dim=None)
        self._down = Linear(build, [f"{prefix}.Wo"], width, [h], bias=bias, dim=None)

    def __call__(self, x: Activations) -> Tensor:
        """x [T, h] to the same."""
        return self._down(self._ops.gelu_mul(self._up(x), tanh=False))


def _local_layers(config: Mapping[str, Any]) -> list[bool]:
    """Which layers have a window: by the list of their types, or all but every third."""
    fields = ConfigFields(config)
    num_layers = fields.num_layers()
    every = fields.size("global_attn_every_n_layers", 3)
    return sliding_layers(fields, num_layers) or [bool(i % every) for i in range(num_layers)]


def _rope(build: ModelBuild, sizes: EncoderSizes, is_local: bool) -> RopeTable:
    """The table of layers with a window, or of the others."""
    fields = ConfigFields(build.config)
    of_kinds = fields.section("rope_parameters")
    kind = "sliding_attention" if is_local else "full_attention"
    own = None if of_kinds is None else of_kinds.section(kind)
    name, theta = ("local_rope_theta", 10000.0) if is_local else ("global_rope_theta", 160000.0)
    config = {
        "max_position_embeddings": sizes.num_positions,
        "rope_theta": fields.number(name, theta),
        "rope_parameters": None if own is None else own.values,
    }
    return make_rope(
        config,
        head_dim=sizes.h // sizes.num_heads,
        max_positions=build.max_positions,
        device=build.device,
    )


def _scored(fields: ConfigFields) -> Pooling:
    allowed = [name for name in get_args(Pooling) if name != "last"]
    return "mean" if fields.choice("classifier_pooling", allowed, "cls") == "mean" else "cls"
