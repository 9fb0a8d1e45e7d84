"""What a weight format tells the quantizer kit: how it stores a matrix, and how well."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = ("layer.first", "layer.second")
"""The kit's linear layers, for settings that name layers: two that are multiplied as one."""

EXPERTS = "layer.experts"
"""What the names of the kit's experts begin with."""

NUM_EXPERTS = 4

EXPERT_LAYERS = tuple(
    f"{EXPERTS}.{e}.{part}_proj" for e in range(NUM_EXPERTS) for part in ("gate", "up", "down")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedCase:
    """How a format stores experts in one tensor, for a quantizer that has `stacked_experts`."""

    store: "Callable[[Tensor], Mapping[str, Tensor]]"
    """Float matrices [E, out, in] as the tensors of a checkpoint, by what follows
    `gate_up_proj` or `down_proj`, such as `_blocks`."""

    stands_for: "Callable[[Tensor], Tensor]"
    """The matrices [E, out, in] float32 that `store` makes of them."""

    max_error: float
    """As in `QuantizerCase`, of one product."""

    max_bytes: float | None = None
    """Bytes that are kept for each weight; None promises nothing."""


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

    stands_for: "Callable[[Tensor], Tensor] | None" = None
    """The matrix [out, in] float32 that `store` makes of one, by the format's definition: products
    must be those with it, up to rounding in float32. None checks `max_error` alone."""

    rounds_inputs: bool = False
    """Whether inputs are rounded, too: then products are those with `stands_for` only where an
    input has one number that is not zero."""

    optional: Sequence[str] = ()
    """Which of the stored tensors a checkpoint may lack."""

    max_expert_bytes: float | None = None
    """As `max_bytes`, of experts that have tensors of their own; None promises nothing."""

    stacked: StackedCase | None = None
    """Of experts in one tensor, such as those of GPT-OSS; None where the format has none."""

    variants: "Mapping[str, QuantizerCase]" = field(default_factory=dict)
    """Further ways to use the format, by what they are; theirs are not looked at."""

    lies: Sequence[Mapping[str, Any]] = ()
    """Settings that must be refused with a ModelError or ConfigError."""
