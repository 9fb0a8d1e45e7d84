"""What encoders share: fields of config.json, the way through the layers, and what comes of it.

T tokens   S sequences   h hidden size   n labels   V vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.errors import RequestError
from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.encoder_layers import ClassifierHead
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import LayerCache, StepBatch
from pagedcore.execution.plain_layers import ACTIVATIONS
from pagedcore.pooling import Pooling, PoolingInfo, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSizes:
    """Fields that every family's config.json has."""

    vocab_size: int
    h: int
    num_layers: int
    num_heads: int
    mlp_width: int
    num_positions: int
    activation: str

    @classmethod
    def read(cls, config: Mapping[str, Any], *, activation_name: str = "hidden_act") -> Self:
        """Raises ModelError, naming the field, for sizes that no such model can have."""
        fields = ConfigFields(config)
        h = fields.size("hidden_size")
        num_heads = fields.size("num_attention_heads")
        if h % num_heads:
            raise fields.error("hidden_size", f"must be a multiple of the {num_heads} heads")
        return cls(
            vocab_size=fields.size("vocab_size"),
            h=h,
            num_layers=fields.num_layers(),
            num_heads=num_heads,
            mlp_width=fields.size("intermediate_size"),
            num_positions=fields.size("max_position_embeddings"),
            activation=fields.choice(activation_name, list(ACTIVATIONS), "gelu"),
        )


def num_labels(config: Mapping[str, Any]) -> int:
    """Labels of a classifier, by the names that config.json has for them; 2 without names."""
    labels = ConfigFields(config).section("id2label")
    return 2 if labels is None else max(1, len(labels.values))


class Layer(Protocol):
    """One of the layers, such as `pagedcore.execution.encoder_layers.PostNormLayer`."""

    def __call__(self, x: Tensor, batch: StepBatch) -> Tensor:
        """x [T, h] to the same."""
        ...


class Encoder:
    """Embedding, layers, norm, classifier: a `pagedcore.execution.pooled_model.PooledModel`."""

    supports_shards = False
    """Encoders are small: several copies serve more than one that is divided."""

    def __init__(
        self,
        build: ModelBuild,
        sizes: EncoderSizes,
        *,
        embedding: Callable[[Tensor, StepBatch], Tensor],
        layers: Sequence[Layer],
        norm: Callable[[Tensor], Tensor] | None = None,
        classifier: ClassifierHead | None = None,
        scored: Pooling = "cls",
    ) -> None:
        """`embedding` maps token ids [T] to [T, h]; a `classifier` looks at what is `scored`."""
        self.vocab_size = sizes.vocab_size
        self.cache_specs: Sequence[CacheSpec | None] = [None] * len(layers)
        self.max_length = sizes.num_positions
        self.task: Task = "embed" if classifier is None else "classify"
        self.pooling = PoolingInfo(
            pooling="mean",
            num_labels=0 if classifier is None else num_labels(build.config),
            scored=scored,
        )
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._classifier = classifier

    def forward(
        self, token_ids: Tensor, batch: StepBatch, caches: Sequence[LayerCache | None]
    ) -> Tensor:
        """See `Model.forward`."""
        x = self._embedding(token_ids, batch)
        for layer in self._layers:
            x = layer(x, batch)
        return x if self._norm is None else self._norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [S, n] for hidden states [S, h] that were pooled.

        Raises RequestError for a model without a classifier, which no request gets past.
        """
        if self._classifier is None:
            raise RequestError("this model has no classifier: it gives no scores", "pooling")
        return self._classifier(hidden)


def prefix_of(build: ModelBuild, prefix: str, name: str) -> str:
    """`prefix` where the checkpoint's names begin with it, as that of a tensor tells; else ""."""
    return prefix if build.weights.has(prefix + name) else ""
