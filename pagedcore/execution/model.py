"""What a model plugin sees: where its weights come from, what it is built with, what it must do.

A model is built once, and its constructor takes every weight it needs by name: there is no second
pass that loads. It is built twice at a start: first with weights on the device "meta", so that a
missing or wrong-shaped tensor, or a config that lies, is found before anything is read or
allocated; then for good. Letters:

    T tokens in the step   S sequences   h hidden size   V vocabulary
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.ops import LayerCache, Ops, StepBatch
from pagedcore.execution.shard import Shard, Share

if TYPE_CHECKING:
    from pagedcore.execution.quantizer import Quantizer


class Weights(Protocol):
    """Where tensors come from: a checkpoint, random numbers, or shapes alone (device "meta")."""

    @property
    def dtype(self) -> torch.dtype:
        """The model's, in which tensors come unless another is asked for."""
        ...

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None where there is none, or any (random numbers)."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        ...

    def take(
        self,
        name: str,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        dim: int | None = None,
    ) -> Tensor:
        """The tensor, on the model's device and contiguous; the caller owns it.

        `shape` is that of the whole tensor; with `dim`, only this rank's share of that dimension
        comes back: what `divide` said of the tensor or of a layer that its name begins with, or
        else as much as all ranks get. `dtype` None is the model's. Raises ModelError, with the
        tensor's name, what was expected and what was found, when it is missing or has another
        shape, or pieces that cannot be divided like this.
        """
        ...

    def divide(self, layer: str, share: Share | None) -> None:
        """The tensors of a layer are divided like this where they are taken with `dim`.

        They may hold the dimension in any number of equal pieces. `share` None says of a tensor
        that all ranks' are added up: rank 0 gets it, and all others zeros. Nothing comes of it
        where there is one rank.
        """
        ...

    def ignore(self, prefix: str) -> None:
        """Tensors whose names begin like this are known, and not needed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBuild:
    """What a model's constructor gets."""

    config: Mapping[str, Any]
    """The checkpoint's config.json."""

    weights: Weights
    """Tensors by the checkpoint's names."""

    quantizer: "Quantizer"
    """How linear layers and experts are stored and multiplied."""

    ops: Ops
    """The backend's operations, which layers hold on to."""

    dtype: torch.dtype
    """Of activations, and of weights that are not quantized."""

    device: torch.device
    """Where the model runs; "meta" while only shapes are looked at."""

    max_positions: int
    """Positions that rotary tables must cover."""

    shard: Shard = Shard()  # noqa: RUF009  # it cannot change
    """Which of several ranks this is, where a model is divided; see `divided.py`."""


class Model(Protocol):
    """A decoder. A plugin's class is called with a ModelBuild and nothing else.

    Raises ModelError, naming the field, for a config.json that it cannot run. A model whose forward
    pass reads on the host says so with a class attribute `supports_graphs = False`: then no step is
    captured. One that does not look at `ModelBuild.shard` where it counts heads or widths says
    `supports_shards = False`, and is run by one rank. One that was made for vectors or scores is a
    `pooled_model.PooledModel`.
    """

    cache_specs: Sequence[CacheSpec | None]
    """What each layer keeps of the past; None keeps nothing."""

    vocab_size: int
    """V, the rows of the head."""

    def __init__(self, build: ModelBuild) -> None: ...

    def forward(
        self, token_ids: Tensor, batch: StepBatch, caches: Sequence[LayerCache | None]
    ) -> Tensor:
        """Run token ids [T] int64 through all layers: the last norm's output [T, h].

        `caches` has one entry per layer. Reads nothing on the host, so that it can be captured.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [S, V], in any float type, for hidden states [S, h] that `forward` returned."""
        ...
