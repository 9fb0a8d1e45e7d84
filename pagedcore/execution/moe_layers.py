"""Mixtures of experts, in the place of a layer's MLP.

    T tokens   h hidden size   E experts   F expert width

As in `layers.py`, a layer takes its weights when it is made, and reads nothing on the host.
"""

import torch
from torch import Tensor

from pagedcore.execution.expert_ops import Routing
from pagedcore.execution.layers import GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.quantized import Activations


class SparseMoE:
    """A mixture of gated MLPs, of which each token takes some."""

    def __init__(
        self,
        build: ModelBuild,
        prefix: str,
        h: int,
        width: int,
        *,
        num_experts: int,
        num_chosen: int,
        normalize: bool,
    ) -> None:
        """`normalize` makes the weights of the chosen experts sum to 1."""
        self._ops = build.ops
        self._routing = Routing(num_chosen=num_chosen, normalize=normalize)
        router = build.weights.take(f"{prefix}.gate.weight", (num_experts, h))
        self._router = router if router.is_meta else build.ops.pack_linear(router)
        self._experts = build.quantizer.experts(
            build.weights, build.ops, f"{prefix}.experts", num_experts, h, width
        )

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `Consumer.wants_quantized`: the router reads the rows as they are."""
        return False

    def __call__(self, x: Activations) -> Tensor:
        """x [T, h] to [T, h]."""
        assert isinstance(x, Tensor), "nobody asked for 8 bits"
        weights, chosen = self._ops.route(self._ops.linear(x, self._router), self._routing)
        return self._experts.apply(x, weights, chosen)


class GatedSharedExpert:
    """A mixture, plus an MLP that all tokens take, each as far as its gate lets it."""

    def __init__(
        self, build: ModelBuild, prefix: str, h: int, width: int, mixture: SparseMoE
    ) -> None:
        """`width` is that of the shared MLP."""
        self._ops = build.ops
        self._mixture = mixture
        self._shared = GatedMLP(build, f"{prefix}.shared_expert", h, width)
        gate = build.weights.take(f"{prefix}.shared_expert_gate.weight", (1, h))
        self._gate = gate if gate.is_meta else build.ops.pack_linear(gate)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `Consumer.wants_quantized`: router and gate read the rows as they are."""
        return False

    def __call__(self, x: Activations) -> Tensor:
        """x [T, h] to [T, h]."""
        assert isinstance(x, Tensor), "nobody asked for 8 bits"
        gate = self._ops.linear(x, self._gate).sigmoid_()
        return self._mixture(x).addcmul_(self._shared(x), gate)
