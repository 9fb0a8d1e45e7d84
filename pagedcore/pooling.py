"""Vectors in place of tokens: what a caller asks for, and what a model makes. No tensors here."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from pagedcore.errors import RequestError

Pooling = Literal["last", "mean", "cls"]
"""The hidden states that a vector is made of: the last token's, all in the mean, or the first's."""

PoolingKind = Literal["last", "mean", "cls", "scores"]
"""A pooling, or what a model's classifier says of the text."""

Task = Literal["generate", "embed", "classify"]
"""What a model was made for. Whatever it is, its hidden states can be pooled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingInfo:
    """What vectors a model makes."""

    pooling: Pooling = "last"
    """The pooling that it was trained with, as far as its folder tells."""

    normalize: bool = True
    """Whether its vectors have length 1 unless a request says otherwise."""

    size: int = 0
    """Elements of a hidden state; 0 is unknown."""

    is_matryoshka: bool = False
    """Whether it was trained so that the first elements of a vector are a vector, too."""

    dimensions: tuple[int, ...] = ()
    """The lengths for which it was, where its config.json lists them."""

    num_labels: int = 0
    """Scores that its classifier gives to a text; 0 is no classifier."""

    scored: Pooling = "cls"
    """The hidden states that its classifier looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """What a request for a vector asks for: how hidden states of the last norm become one.

    Raises RequestError, naming the field, for a value that means nothing.
    """

    pooling: PoolingKind | None = None
    """None is the model's own."""

    normalize: bool | None = None
    """Scale vectors to length 1; None is the model's own way. Scores are never scaled."""

    dimensions: int | None = None
    """Keep so many leading elements, before the scaling; for models trained for it (EMB-1)."""

    num_first: int | None = None
    """Tokens of the first of two texts in one prompt, its separators included: what follows is of
    the second type, for models that tell them apart."""

    def __post_init__(self) -> None:
        kinds = get_args(PoolingKind)
        if self.pooling is not None and self.pooling not in kinds:
            allowed = ", ".join(kinds)
            raise RequestError(
                f"pooling must be one of {allowed}, not {self.pooling!r:.80}", "pooling"
            )
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise RequestError("normalize must be true or false", "normalize")
        for name in ("dimensions", "num_first"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise RequestError(f"{name} must be a positive integer, not {value!r:.80}", name)

    @property
    def needs_all(self) -> bool:
        """Whether every position is looked at, so that none may come from the cache (KV-10)."""
        return self.pooling != "last"

    def settled(self, model: PoolingInfo) -> "PoolingParams":
        """The same with nothing left open; raises RequestError for what the model cannot do."""
        pooling = self.pooling or model.pooling
        normalize = model.normalize if self.normalize is None else self.normalize
        if pooling == "scores":
            if not model.num_labels:
                raise RequestError("this model has no classifier: it gives no scores", "pooling")
            normalize = False
        if self.dimensions is not None:
            self._check_dimensions(self.dimensions, pooling, model)
        return replace(self, pooling=pooling, normalize=normalize)

    def _check_dimensions(self, asked: int, pooling: PoolingKind, model: PoolingInfo) -> None:
        if pooling == "scores":
            raise RequestError("scores cannot be cut: remove dimensions", "dimensions")
        if not model.is_matryoshka:
            raise RequestError(
                "this model's vectors cannot be cut: remove dimensions (config.json would say "
                "is_matryoshka or matryoshka_dimensions)",
                "dimensions",
            )
        if model.dimensions and asked not in model.dimensions:
            allowed = ", ".join(map(str, model.dimensions))
            raise RequestError(f"dimensions must be one of {allowed}, not {asked}", "dimensions")
        if model.size and asked > model.size:
            raise RequestError(f"dimensions may be at most {model.size}, not {asked}", "dimensions")
