"""Scales that make the rounding of a layer's weights less of an error in its output.

    N rows of inputs   in, out: of the layer

An input that is large makes the rounding errors of its column large too. Such a column is
multiplied by a scale before it is rounded, and what makes the input is divided by it: the norm
before the layer, or the rows of the matrix before it. The model stays what it is, but for rounding.
Where inputs are rounded too, an input that is large makes the steps of all others large, and
dividing it helps them as well (SmoothQuant). How much of an input's size becomes its scale is tried
out, layer by layer (AWQ).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagedcore.execution.model import Weights
from pagedcore.execution.quantizing.layers import WEIGHT, Group
from pagedcore.execution.quantizing.writer import RoundsInputs, WeightWriter
from pagedcore.execution.safetensors_file import StoredTensor
from pagedcore.execution.shard import Share

STEPS = 20
"""Exponents that are tried: 0, 1 / STEPS, 2 / STEPS, ..."""

MAX_OUTPUTS = 256
"""Of a layer: those whose error is measured."""

_LEAST = 1e-3  # of the mean: what a smaller input counts as

_ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv_proj"}
_MLP = {"gate_proj", "up_proj", "gate_up_proj"}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What went into a group of layers."""

    size: Tensor
    """[in] float32: mean magnitude."""

    rows: Tensor
    """[N, in]: some of them."""


@dataclass(slots=True)
class Balance:
    """Scales by layer. Tensors are [n] float32."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    """By layer: its columns are multiplied."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    """By norm or layer: its outputs are divided."""

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the checkpoint with its scales, in float32; itself where it has none."""
        layer, _, kind = name.rpartition(".")
        divided, multiplied = self.outputs.get(layer), self.columns.get(layer)
        if divided is not None and kind in ("weight", "bias"):
            by = divided.to(tensor.device)
            tensor = tensor.float() / (by if tensor.ndim == 1 else by[:, None])
        if multiplied is not None and kind == "weight":
            tensor = tensor.float() * multiplied.to(tensor.device)
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All scales, to be stored."""
        columns = {f"columns.{name}": scale.clone() for name, scale in self.columns.items()}
        return columns | {f"outputs.{name}": scale for name, scale in self.outputs.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Balance":
        """What `tensors` stored."""
        balance = cls()
        for name, scale in tensors.items():
            kind, _, layer = name.partition(".")
            (balance.columns if kind == "columns" else balance.outputs)[layer] = scale
        return balance

    def add(self, group: Group, source: str, scale: Tensor) -> None:
        """Balance the layers of a group, whose input `source` makes."""
        self.outputs[source] = scale
        self.columns.update(dict.fromkeys(group, scale))


class Balanced:
    """`Weights` with scales applied."""

    def __init__(self, weights: Weights, balance: Balance) -> None:
        self._weights = weights
        self._balance = balance

    @property
    def dtype(self) -> torch.dtype:
        """See `Weights.dtype`."""
        return self._weights.dtype

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """See `Weights.stored_shape`."""
        return self._weights.stored_shape(name)

    def has(self, name: str) -> bool:
        """See `Weights.has`."""
        return self._weights.has(name)

    def take(
        self,
        name: str,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        dim: int | None = None,
    ) -> Tensor:
        """See `Weights.take`."""
        tensor = self._weights.take(name, shape, dtype=dtype, dim=dim)
        return self._balance.apply(name, tensor).to(tensor.dtype)

    def divide(self, layer: str, share: Share | None) -> None:
        """See `Weights.divide`."""
        self._weights.divide(layer, share)

    def ignore(self, prefix: str) -> None:
        """See `Weights.ignore`."""
        self._weights.ignore(prefix)


def source_of(group: Group, stored: Mapping[str, StoredTensor]) -> str | None:
    """The norm or layer that makes the input of a group, by the names that checkpoints have.

    None where none is known, or where several inputs are made of one output, as with heads that
    share values. A name may mean something else in some architecture: see `calibration.verify`.
    """
    parents = {name.rpartition(".")[0] for name in group}
    leaves = {name.rpartition(".")[2] for name in group}
    if len(parents) != 1:
        return None
    parent = parents.pop()
    layer, _, block = parent.rpartition(".")
    if block == "self_attn" and leaves <= _ATTENTION:
        sources = [f"{layer}.input_layernorm"]
    elif block == "mlp" and leaves <= _MLP:
        norms = ("pre_feedforward_layernorm", "post_attention_layernorm")
        sources = [f"{layer}.{norm}" for norm in norms]
    elif block == "self_attn" and leaves == {"o_proj"}:
        sources = [f"{parent}.v_proj"]
    elif block == "mlp" and leaves == {"down_proj"}:
        sources = [f"{parent}.up_proj"]
    else:
        return None
    size = stored[group[0] + WEIGHT].shape[1]
    for source in sources:
        found = stored.get(source + WEIGHT)
        if found is not None:
            return source if found.shape[0] == size else None
    return None


def best_scale(weights: Sequence[Tensor], inputs: Inputs, writer: WeightWriter) -> Tensor | None:
    """The scale [in] that leaves the least error in the outputs of layers [out, in] float32.

    None where rounding them as they are is best.
    """
    some = [weight[:: -(-len(weight) // MAX_OUTPUTS)].contiguous() for weight in weights]
    size = inputs.size.clamp(min=float(inputs.size.mean()) * _LEAST)
    rows = inputs.rows.float()
    best: Tensor | None = None
    least = float("inf")
    for step in range(STEPS):
        scale = size ** (step / STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        given = rows / scale
        if isinstance(writer, RoundsInputs):
            given = writer.rounded_inputs(given)
        error = 0.0
        for weight in some:
            found = given @ writer.rounded(weight * scale).t()
            error += float((found - rows @ weight.t()).square().sum())
        if error < least:
            least, best = error, (scale if step else None)
    return best
