"""What a weight format must do so that checkpoints can be written in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterOptions:
    """What a command line says of a format; None is the format's own choice."""

    bits: int | None = None
    """Of a weight."""

    group_size: int | None = None
    """Inputs that share a scale; -1 is all of them."""


class WeightWriter(Protocol):
    """Stores matrices. A factory in the `pagedcore_weight_writers` hook makes it.

    A factory is called with `WriterOptions`, and raises ConfigError for those that its format does
    not have.
    """

    balances: bool
    """Whether scales from a calibration text make its rounding better.

    If so, each row of a matrix is rounded by itself.
    """

    def config(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """The `quantization_config`, by which the format's quantizer reads what was written.

        `kept` are the names of layers that stay as they are.
        """
        ...

    def check(self, name: str, rows: int, columns: int) -> None:
        """Raise ConfigError, with the remedy, for a layer whose sizes the format cannot store."""
        ...

    def write(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The tensors of a matrix [out, in] float32, by what follows the layer's name and a dot."""
        ...

    def rounded(self, weight: Tensor) -> Tensor:
        """What `write` makes of a matrix, as it is read again: [out, in] float32."""
        ...


@runtime_checkable
class RoundsInputs(Protocol):
    """A `WeightWriter` whose layers round their inputs too: scales are chosen for both."""

    def rounded_inputs(self, x: Tensor) -> Tensor:
        """What a layer makes of its inputs [N, in] float32, each row by itself."""
        ...
