"""Routing and the fused mixture of experts against plain torch, in float64."""

import pytest
import torch
from torch.nn.functional import silu

from pagedcore.execution.expert_ops import Clamp, Experts, Routing
from pagedcore.execution.torch_ops import TorchOps
from pagedcore_kernels.expert_routing import route
from pagedcore_kernels.moe import moe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 64, 48, 8, 2), (5, 72, 40, 12, 3), (33, 64, 32, 4, 4), (130, 32, 16, 3, 1)]


def drawing(seed):
    rng = torch.Generator(DEVICE).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=rng, device=DEVICE)


def reference(x, weights, chosen, experts):
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    zero = torch.zeros((), dtype=torch.float64)
    for t in range(len(x)):
        for w, e in zip(weights[t].double(), chosen[t], strict=True):
            inner = experts.gate_up[e].double() @ x[t].double()
            inner += zero if experts.gate_up_bias is None else experts.gate_up_bias[e]
            gate, up = inner.chunk(2)
            if experts.clamp is None:
                inner = silu(gate) * up
            else:
                gate = gate.clamp(max=experts.clamp.limit)
                up = up.clamp(-experts.clamp.limit, experts.clamp.limit)
                inner = gate * torch.sigmoid(experts.clamp.alpha * gate) * (up + 1)
            added = zero if experts.down_bias is None else experts.down_bias[e]
            out[t] += w * (experts.down[e].double() @ inner + added)
    return out


@pytest.mark.parametrize(("tokens", "hidden", "width", "experts", "chosen"), SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_experts_mix_as_the_plain_definition_says(
    tokens, hidden, width, experts, chosen, normalize
):
    draw = drawing(tokens)
    x, logits = draw(tokens, hidden), draw(tokens, experts)
    mixture = Experts(
        gate_up=draw(experts, 2 * width, hidden) * hidden**-0.5,
        down=draw(experts, hidden, width) * width**-0.5,
    )
    routing = Routing(num_chosen=chosen, normalize=normalize, scale=1.5)
    weights, ids = route(logits, routing)
    got, want = moe(x, weights, ids, mixture), reference(x, weights, ids, mixture)
    assert (got - want).norm() / want.norm() < 1e-5
    torch.testing.assert_close(moe(x, weights, ids, mixture), got, rtol=0, atol=0)
    plain = TorchOps(DEVICE).moe(x, weights, ids, mixture)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("tokens", "hidden", "width", "experts", "chosen"), SHAPES)
def test_experts_may_have_biases_and_a_clamped_activation(tokens, hidden, width, experts, chosen):
    draw = drawing(tokens)
    mixture = Experts(
        gate_up=draw(experts, 2 * width, hidden) * 3 * hidden**-0.5,
        down=draw(experts, hidden, width) * width**-0.5,
        gate_up_bias=draw(experts, 2 * width),
        down_bias=draw(experts, hidden),
        clamp=Clamp(alpha=1.702, limit=2.0),
    )
    x = draw(tokens, hidden)
    weights, ids = route(draw(tokens, experts), Routing(num_chosen=chosen, normalize=True))
    got, want = moe(x, weights, ids, mixture), reference(x, weights, ids, mixture)
    assert (got - want).norm() / want.norm() < 1e-5
    plain = TorchOps(DEVICE).moe(x, weights, ids, mixture)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)


ROUTINGS = [
    Routing(num_chosen=1, normalize=True),
    Routing(num_chosen=3, normalize=False, scale=2.5),
    Routing(num_chosen=3, normalize=True, sigmoid=True, scale=2.5),
    Routing(num_chosen=4, normalize=False, num_groups=3, num_groups_chosen=2),
    Routing(
        num_chosen=3, normalize=True, sigmoid=True, num_groups=6, num_groups_chosen=3,
        group_terms=2, scale=2.5,
    ),
]  # fmt: skip


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_tokens_choose_as_the_plain_definition_says(routing, has_bias):
    draw = drawing(1)
    logits, bias = draw(40, 12), draw(12) if has_bias else None
    weights, chosen = route(logits, routing, bias)
    want_weights, want_chosen = TorchOps(DEVICE).route(logits, routing, bias)
    assert chosen.tolist() == want_chosen.tolist()
    torch.testing.assert_close(weights, want_weights, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes
def test_scores_that_are_no_numbers_choose_experts_that_exist():
    logits = torch.full((2, 5), torch.nan, device=DEVICE)
    logits[1] = 0
    weights, chosen = route(logits, Routing(num_chosen=2, normalize=True))
    assert ((chosen >= 0) & (chosen < 5)).all()
    assert weights[0].isnan().all()
    torch.testing.assert_close(weights[1], torch.full((2,), 0.5, device=DEVICE))


def test_an_expert_that_nobody_chose_is_never_read():
    draw = drawing(0)
    x, logits = draw(9, 32), draw(9, 4)
    logits[:, 2] = -1e9
    mixture = Experts(gate_up=draw(4, 32, 32), down=draw(4, 32, 16))
    mixture.gate_up[2], mixture.down[2] = float("nan"), float("nan")
    out = moe(x, *route(logits, Routing(num_chosen=2, normalize=True)), mixture)
    assert torch.isfinite(out).all()
