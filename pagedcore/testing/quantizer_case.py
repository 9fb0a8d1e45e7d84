"""What a weight format tells the quantizer kit: how it stores a matrix, and how well."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerCase:
    """One way to use a format, and the bounds that it promises."""

    settings: Mapping[str, Any]
    """The checkpoint's `quantization_config`; empty for a format that is applied while loading."""

    max_error: float
    """Of a product with a random normal matrix: root mean square, as a share of the product's."""

    max_bytes: float
    """Bytes that are kept for each weight, scales included."""

    store: "Callable[[Tensor], Mapping[str, Tensor]] | None" = None
    """A float matrix [out, in] as the tensors of a checkpoint, by what follows the layer's name
    and a dot; None stores it as it is, under `weight`."""

    lies: Sequence[Mapping[str, Any]] = ()
    """Settings that must be refused with a ModelError or ConfigError."""
