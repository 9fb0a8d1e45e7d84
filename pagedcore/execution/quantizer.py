"""How a weight format stores linear layers and experts, and multiplies with them.

    T tokens   E experts   C experts chosen per token   F expert width   h hidden size

A quantizer takes the tensors that its format has for a layer from the checkpoint, by the names of
the layer's parts: `model.layers.0.self_attn.q_proj` and its siblings become one matrix. It is asked
twice, first with weights on the device "meta": then shapes are all that counts.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pagedcore.execution.expert_ops import Experts
from pagedcore.execution.model import Weights
from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import Activations, Grouped


class LinearMethod(Protocol):
    """The stored weight of one linear layer."""

    def apply(self, x: Activations) -> Tensor:
        """x [T, in] times the weight, plus the bias where there is one: [T, out] in x's dtype.

        x is Quantized only where `wants_quantized` says so.
        """
        ...

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """Whether `apply` is faster for so many rows of `dtype` if they come Quantized."""
        ...


class ExpertsMethod(Protocol):
    """The stored weights of one layer's experts."""

    def apply(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Mix experts over x [T, h] as `Ops.route` said; see `Ops.moe`."""
        ...


class Quantizer(Protocol):
    """A weight format. A factory in the `pagedcore_quantizers` hook makes it."""

    name: str
    """As in `--quantization`."""

    def linear(
        self,
        weights: Weights,
        ops: Ops,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool,
        dim: int | None,
    ) -> LinearMethod:
        """Take one matrix of sum(out_features) rows, its parts below each other.

        `dim` is what tensor parallelism divides: 0 the rows, 1 the columns, None nothing. It goes
        on to `Weights.take` for whichever dimension of a tensor those are; sizes are of the whole,
        and what was taken says what came of them. Products with a part of the columns are added up
        by who asks.
        """
        ...

    def experts(
        self, weights: Weights, ops: Ops, prefix: str, num_experts: int, h: int, width: int
    ) -> ExpertsMethod:
        """Take the experts `{prefix}.{e}.gate_proj`, `.up_proj` and `.down_proj`, e < E.

        Tensor parallelism divides each one's width: `dim` of `Weights.take` is 0 for the rows of
        gates and their partners, and 1 for the columns behind them. `width` is the whole, and what
        was taken says what came of it.
        """
        ...


@runtime_checkable
class HeadQuantizer(Protocol):
    """What a `Quantizer` has besides, whose format may hold a decoder's head in few bits."""

    def head(self, weights: Weights, name: str, vocab_size: int, h: int) -> Grouped | None:
        """Take the head `name`, [V, h], its rows divided by ranks; None if it has 16 bits."""
        ...


class Unquantized:
    """Weights as they are, in the model's type."""

    name = "none"

    def linear(
        self,
        weights: Weights,
        ops: Ops,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool,
        dim: int | None,
    ) -> LinearMethod:
        """See `Quantizer.linear`."""
        weight, added = take_linear(weights, names, in_features, out_features, bias=bias, dim=dim)
        return UnquantizedLinear(ops, weight, added)

    def experts(
        self, weights: Weights, ops: Ops, prefix: str, num_experts: int, h: int, width: int
    ) -> ExpertsMethod:
        """See `Quantizer.experts`."""
        return UnquantizedExperts(ops, take_experts(weights, prefix, num_experts, h, width))


class UnquantizedLinear:
    """A matrix in the backend's own layout."""

    def __init__(self, ops: Ops, weight: Tensor, bias: Tensor | None) -> None:
        self._ops = ops
        self._weight = weight if weight.is_meta else ops.pack_linear(weight)
        self._bias = bias

    def apply(self, x: Activations) -> Tensor:
        """See `LinearMethod.apply`."""
        assert isinstance(x, Tensor), "nobody asked for 8 bits"
        return self._ops.linear(x, self._weight, self._bias)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `LinearMethod.wants_quantized`."""
        return False


class UnquantizedExperts:
    """Two stacks of matrices."""

    def __init__(self, ops: Ops, experts: Experts) -> None:
        self._ops = ops
        self._experts = experts

    def apply(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """See `ExpertsMethod.apply`."""
        return self._ops.moe(x, weights, chosen, self._experts)


def take_linear(
    weights: Weights,
    names: Sequence[str],
    in_features: int,
    out_features: Sequence[int],
    *,
    bias: bool,
    dim: int | None,
) -> tuple[Tensor, Tensor | None]:
    """One matrix [out, in] in the model's type, and its bias [out], from its parts' names."""
    parts = list(zip(names, out_features, strict=True))
    matrices = [weights.take(f"{n}.weight", (rows, in_features), dim=dim) for n, rows in parts]
    weight = join_rows(matrices)
    if not bias:
        return weight, None
    share = 0 if dim == 0 else None
    return weight, join_rows([weights.take(f"{n}.bias", (rows,), dim=share) for n, rows in parts])


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """The parts below each other: torch.cat, for the device "meta" too.

    There, torch would first load its compiler, which takes seconds of every start.
    """
    if len(parts) == 1:
        return parts[0]
    if parts[0].is_meta:
        rows = sum(len(part) for part in parts)
        return torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype, device="meta")
    return torch.cat(list(parts))


def take_experts(weights: Weights, prefix: str, num_experts: int, h: int, width: int) -> Experts:
    """E experts, in the model's type."""
    gate_up: Tensor | None = None
    down: Tensor | None = None
    for e in range(num_experts):  # filled one by one, so that no expert is in memory twice
        gate = weights.take(f"{prefix}.{e}.gate_proj.weight", (width, h), dim=0)
        own = len(gate)
        if gate_up is None or down is None:
            gate_up = gate.new_empty(num_experts, 2 * own, h)
            down = gate.new_empty(num_experts, h, own)
        gate_up[e, :own] = gate
        gate_up[e, own:] = weights.take(f"{prefix}.{e}.up_proj.weight", (width, h), dim=0)
        down[e] = weights.take(f"{prefix}.{e}.down_proj.weight", (h, width), dim=1)
    assert gate_up is not None, "a mixture has at least one expert"
    assert down is not None
    return Experts(gate_up=gate_up, down=down)
