"""BERT, and the RoBERTas, whose positions begin behind the padding token's."""

from collections.abc import Callable

import torch
from torch import Tensor

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.encoder_layers import ClassifierHead, EncoderAttention, PostNormLayer
from pagedcore.execution.layers import Embedding
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import StepBatch
from pagedcore.execution.plain_layers import LayerNorm, LearnedPositions, PlainMLP
from pagedcore_models.encoder import Encoder, EncoderSizes, num_labels, prefix_of


class BertModel(Encoder):
    """BERT of any size: vectors, and scores where a subclass has a classifier."""

    prefix = "bert."
    """Of the names in checkpoints that hold more than the encoder."""

    skips_padding = False
    """Whether positions are counted from behind the padding token's id, as RoBERTa's are."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        fields.choice("position_embedding_type", ["absolute"], "absolute")
        sizes = EncoderSizes.read(build.config)
        eps = fields.number("layer_norm_eps", 1e-12)
        offset = 0
        if self.skips_padding:
            offset = fields.size("pad_token_id", 1, least=0) + 1
            if offset >= sizes.num_positions:
                raise fields.error("max_position_embeddings", f"must be more than {offset}")
        prefix = prefix_of(build, self.prefix, "embeddings.word_embeddings.weight")
        embedding = _Embedding(build, f"{prefix}embeddings", sizes, eps, offset)

        def layer(name: str) -> PostNormLayer:
            mixer = f"{name}.attention"
            attention = EncoderAttention(
                build,
                [f"{mixer}.self.{part}" for part in ("query", "key", "value")],
                f"{mixer}.output.dense",
                sizes.h,
                sizes.num_heads,
                bias=True,
            )
            names = [f"{name}.intermediate.dense", f"{name}.output.dense"]
            return PostNormLayer(
                attention,
                LayerNorm(build, f"{mixer}.output.LayerNorm", sizes.h, eps),
                PlainMLP(build, names, sizes.h, sizes.mlp_width, activation=sizes.activation),
                LayerNorm(build, f"{name}.output.LayerNorm", sizes.h, eps),
            )

        layers = [layer(f"{prefix}encoder.layer.{i}") for i in range(sizes.num_layers)]
        classifier = self.make_classifier(build, prefix, sizes.h)
        for unused in (f"{prefix}pooler.", "cls.", "lm_head."):
            build.weights.ignore(unused)
        super().__init__(build, sizes, embedding=embedding, layers=layers, classifier=classifier)
        self.max_length = sizes.num_positions - offset

    def make_classifier(self, build: ModelBuild, prefix: str, h: int) -> ClassifierHead | None:
        """What gives scores, in a model that has it."""
        return None


class BertForSequenceClassification(BertModel):
    """BERT with a classifier, such as rerankers of queries and documents."""

    def make_classifier(self, build: ModelBuild, prefix: str, h: int) -> ClassifierHead | None:
        """See `BertModel.make_classifier`."""
        return ClassifierHead(
            build,
            h,
            num_labels(build.config),
            inner=f"{prefix}pooler.dense",
            activation=torch.tanh,
            outer="classifier",
        )


class XLMRobertaModel(BertModel):
    """XLM-RoBERTa and RoBERTa."""

    prefix = "roberta."
    skips_padding = True


class XLMRobertaForSequenceClassification(XLMRobertaModel):
    """The same with a classifier."""

    def make_classifier(self, build: ModelBuild, prefix: str, h: int) -> ClassifierHead | None:
        """See `BertModel.make_classifier`."""
        return ClassifierHead(
            build,
            h,
            num_labels(build.config),
            inner="classifier.dense",
            activation=torch.tanh,
            outer="classifier.out_proj",
        )


class RobertaModel(XLMRobertaModel):
    """RoBERTa, which is built alike."""


class RobertaForSequenceClassification(XLMRobertaForSequenceClassification):
    """The same with a classifier."""


class _Embedding:
    """Token, position and type, and a norm of their sum."""

    def __init__(
        self, build: ModelBuild, prefix: str, sizes: EncoderSizes, eps: float, offset: int
    ) -> None:
        """Position 0 is row `offset` of its table."""
        num_types = ConfigFields(build.config).size("type_vocab_size", 2)
        self._words = Embedding(build, f"{prefix}.word_embeddings", sizes.vocab_size, sizes.h)
        self._positions = LearnedPositions(
            build,
            f"{prefix}.position_embeddings",
            sizes.num_positions - offset,
            sizes.h,
            offset=offset,
        )
        self._types = build.weights.take(
            f"{prefix}.token_type_embeddings.weight", (num_types, sizes.h)
        )
        self._norm: Callable[[Tensor], Tensor] = LayerNorm(
            build, f"{prefix}.LayerNorm", sizes.h, eps
        )
        build.weights.ignore(f"{prefix}.position_ids")

    def __call__(self, token_ids: Tensor, batch: StepBatch) -> Tensor:
        """Token ids [T] to [T, h]."""
        types = self._types[0]
        if batch.token_types is not None and len(self._types) > 1:
            types = self._types[batch.token_types]
        return self._norm(self._words(token_ids) + self._positions(batch.positions) + types)
