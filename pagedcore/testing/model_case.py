"""What a plugin tells the model kit: its architectures, each so small that it runs in no time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pagedcore.pooling import Task

VOCAB_SIZE = 320
"""Bytes, BEGIN, END, and some ids that no text has."""

BEGIN, END = 256, 257

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=BEGIN,
    eos_token_id=END,
    tie_word_embeddings=False,
)
"""Fields of config.json that most tiny models share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCase:
    """An architecture's smallest useful configuration, and what docs/models.md says of it.

    Every feature of the architecture should do something at this size: a window is shorter than 37
    tokens, the kit's longest prompt, and each kind of layer occurs.
    """

    family: str
    """The models that have this architecture, such as "Llama 2, 3, 3.1 and 3.2; SmolLM2"."""

    config: Mapping[str, Any]
    """Its config.json, with `model_type`, such as `{**SIZES, "model_type": "llama"}`."""

    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further configurations to check, by what they are: the fields that differ from `config`."""

    reference: str = "AutoModelForCausalLM"
    """The class of transformers that makes the reference; "" where transformers has none."""

    task: Task = "generate"
    """What it was made for. Of one that embeds, hidden states are compared, and of one that
    classifies, scores; `reference` is such as AutoModel or AutoModelForSequenceClassification."""

    embeds: bool = False
    """Whether a decoder of the architecture is published without a head, too, to make vectors."""

    notes: str = ""
    """What a user should know, in a few words."""
