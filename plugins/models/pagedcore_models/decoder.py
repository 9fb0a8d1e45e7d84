"""What all families share: the fields of config.json, and the way through the layers.

T tokens   S sequences   h hidden size   V vocabulary
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Embedding, Head, RMSNorm
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import LayerCache, RopeTable, StepBatch
from pagedcore.execution.rope import make_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSizes:
    """Fields that every family's config.json has."""

    vocab_size: int
    h: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    eps: float
    tied: bool
    activation: str

    @classmethod
    def read(
        cls,
        config: Mapping[str, Any],
        *,
        head_dim: int | None = None,
        eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
        tied: bool = False,
        activations: Sequence[str] = ("silu",),
        activation_name: str = "hidden_act",
    ) -> Self:
        """`head_dim` is the family's, where config.json has none; by default h / num_heads.

        `eps` is the field's name, and what it is without one, and `tied` whether embedding and head
        are one where config.json does not say. The family's MLP can have these `activations`, of
        which the field `activation_name` says one; the first is taken where it does not.
        Raises ModelError, naming the field, for sizes that no such model can have.
        """
        fields = ConfigFields(config)
        h = fields.size("hidden_size")
        num_heads = fields.size("num_attention_heads")
        num_kv_heads = fields.size("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"must divide the {num_heads} heads")
        if head_dim is None and not fields.has("head_dim") and h % num_heads:
            raise fields.error("hidden_size", f"must be a multiple of the {num_heads} heads")
        head_dim = fields.size("head_dim", head_dim or h // num_heads)
        if head_dim % 2:
            raise fields.error("head_dim", f"must be even; it is {head_dim}")
        return cls(
            vocab_size=fields.size("vocab_size"),
            h=h,
            num_layers=fields.num_layers(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mlp_width=fields.size("intermediate_size"),
            eps=fields.number(*eps),
            tied=fields.flag("tie_word_embeddings", tied),
            activation=fields.choice(activation_name, activations, activations[0]),
        )

    def rope(self, build: ModelBuild, theta: float = 10000.0) -> RopeTable:
        """The rotary table, which all layers share; `theta` is the family's base."""
        return make_rope(
            build.config,
            head_dim=self.head_dim,
            max_positions=build.max_positions,
            device=build.device,
            theta=theta,
        )


class Layer(Protocol):
    """One of the layers of a decoder, such as `pagedcore.execution.layers.DecoderLayer`."""

    cache_spec: CacheSpec

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: StepBatch, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """x and residual [T, h] to the same, of which the sum is the stream; None is a zero."""
        ...


class Decoder:
    """Embedding, layers, norm, head: a `pagedcore.execution.model.Model` but for its layers."""

    def __init__(
        self,
        build: ModelBuild,
        sizes: DecoderSizes,
        layers: Sequence[Layer],
        *,
        embedding_scale: float = 1.0,
        norm_offset: float = 0.0,
    ) -> None:
        """`norm_offset` is added to the weight of the last norm."""
        self.vocab_size = sizes.vocab_size
        self.cache_specs: Sequence[CacheSpec | None] = [layer.cache_spec for layer in layers]
        self._embedding = Embedding(
            build, "model.embed_tokens", sizes.vocab_size, sizes.h, embedding_scale
        )
        self._layers = layers
        self._norm = RMSNorm(build, "model.norm", sizes.h, sizes.eps, offset=norm_offset)
        tied = self._embedding if sizes.tied else None
        self._head = Head(build, "lm_head", sizes.vocab_size, sizes.h, tied)

    def forward(
        self, token_ids: Tensor, batch: StepBatch, caches: Sequence[LayerCache | None]
    ) -> Tensor:
        """See `Model.forward`."""
        x, residual = self._embedding(token_ids), None
        for layer, cache in zip(self._layers, caches, strict=True):
            x, residual = layer(x, residual, batch, cache)
        assert residual is not None, "a model has at least one layer"
        return self._norm.add(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        return self._head(hidden)


def windows(config: Mapping[str, Any], num_layers: int) -> list[int | None]:
    """How far each layer of a Qwen looks back; None is all the way.

    A config lists its layers' types, or says from which layer on there are windows.
    """
    fields = ConfigFields(config)
    if not fields.flag("use_sliding_window", False) or not fields.has("sliding_window"):
        return [None] * num_layers
    window = fields.size("sliding_window")
    first = fields.size("max_window_layers", 28, least=0)
    has_window = sliding_layers(fields, num_layers) or [i >= first for i in range(num_layers)]
    return [window if has else None for has in has_window]


def sliding_layers(fields: ConfigFields, num_layers: int) -> list[bool] | None:
    """Which layers have a window by the config's list of their types; None without such a list."""
    types = fields.values.get("layer_types")
    if types is None:
        return None
    known = ("sliding_attention", "full_attention")
    if type(types) is not list or len(types) != num_layers or any(t not in known for t in types):
        raise fields.error("layer_types", f"must list one of {', '.join(known)} for each layer")
    return [t == "sliding_attention" for t in types]
