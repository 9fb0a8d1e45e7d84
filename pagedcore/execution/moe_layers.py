"""Mixtures of experts, in the place of a layer's MLP.

    T tokens   h hidden size   E experts   F expert width

As in `layers.py`, a layer takes its weights when it is made, and reads nothing on the host.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.execution.expert_ops import Clamp, Routing
from pagedcore.execution.layers import GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.quantized import Activations
from pagedcore.execution.quantizer import ExpertsMethod
from pagedcore.execution.stacked_experts import stacked_experts


class Mixture:
    """Some MLPs of many for each token, which a router chooses."""

    def __init__(
        self,
        build: ModelBuild,
        routing: Routing,
        router: Tensor,
        experts: ExpertsMethod,
        *,
        router_bias: Tensor | None = None,
        choice_bias: Tensor | None = None,
    ) -> None:
        """The router's weight is [E, h]; if it is float32, so are the scores.

        `router_bias` [E] is part of the scores, `choice_bias` [E] float32 counts only where experts
        are chosen.
        """
        self._ops = build.ops
        self._routing = routing
        self._is_exact = router.dtype == torch.float32
        is_packed = not (router.is_meta or self._is_exact)
        self._router = build.ops.pack_linear(router) if is_packed else router
        self._router_bias = router_bias
        self._choice_bias = choice_bias
        self._experts = experts

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `Consumer.wants_quantized`: the router reads the rows as they are."""
        return False

    def __call__(self, x: Activations) -> Tensor:
        """x [T, h] to [T, h]."""
        assert isinstance(x, Tensor), "nobody asked for 8 bits"
        if self._is_exact:
            scores = functional.linear(x.float(), self._router, self._router_bias)
        else:
            scores = self._ops.linear(x, self._router, self._router_bias)
        weights, chosen = self._ops.route(scores, self._routing, self._choice_bias)
        return self._experts.apply(x, weights, chosen)


class SparseMoE(Mixture):
    """A mixture of gated MLPs, each of which has tensors of its own."""

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
        super().__init__(
            build,
            Routing(num_chosen=num_chosen, normalize=normalize),
            build.weights.take(f"{prefix}.gate.weight", (num_experts, h)),
            build.quantizer.experts(
                build.weights, build.ops, f"{prefix}.experts", num_experts, h, width
            ),
        )


class StackedMoE(Mixture):
    """A mixture of clamped MLPs with biases, whose tensors hold all of them (GPT-OSS)."""

    def __init__(
        self,
        build: ModelBuild,
        prefix: str,
        h: int,
        width: int,
        *,
        num_experts: int,
        num_chosen: int,
        clamp: Clamp,
    ) -> None:
        """The weights of the chosen experts sum to 1."""
        super().__init__(
            build,
            Routing(num_chosen=num_chosen, normalize=True),
            build.weights.take(f"{prefix}.router.weight", (num_experts, h)),
            stacked_experts(
                build.quantizer,
                build.weights,
                build.ops,
                f"{prefix}.experts",
                num_experts,
                h,
                width,
                clamp,
            ),
            router_bias=build.weights.take(f"{prefix}.router.bias", (num_experts,)),
        )


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


class SharedExperts:
    """A mixture, plus an MLP that all tokens take (DeepSeek)."""

    def __init__(self, mixture: Mixture, shared: GatedMLP) -> None:
        self._mixture = mixture
        self._shared = shared

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `Consumer.wants_quantized`: the router reads the rows as they are."""
        return False

    def __call__(self, x: Activations) -> Tensor:
        """x [T, h] to [T, h]."""
        return self._mixture(x).add_(self._shared(x))
