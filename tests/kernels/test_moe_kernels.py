"""The fused mixture of experts against plain torch in float64."""

import pytest
import torch

from pagedcore_kernels.moe import moe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(x, router_logits, gate_up, down, num_chosen, normalize, scale=1.0):
    p = router_logits.double().softmax(-1)
    weights, experts = p.topk(num_chosen, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for t in range(len(x)):
        for w, e in zip(weights[t], experts[t], strict=True):
            gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
            out[t] += scale * w * (down[e].double() @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "chosen"),
    [(1, 64, 48, 8, 2), (5, 72, 40, 12, 3), (33, 64, 32, 4, 4), (130, 32, 16, 3, 1)],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_experts_mix_as_the_plain_definition_says(
    tokens, hidden, width, experts, chosen, normalize
):
    rng = torch.Generator(DEVICE).manual_seed(tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, device=DEVICE)

    x, logits = draw(tokens, hidden), draw(tokens, experts)
    gate_up = draw(experts, 2 * width, hidden) * hidden**-0.5
    down = draw(experts, hidden, width) * width**-0.5
    got = moe(x, logits, gate_up, down, chosen, normalize=normalize, scale=1.5)
    want = reference(x, logits, gate_up, down, chosen, normalize, 1.5)
    assert (got - want).norm() / want.norm() < 1e-5


def test_an_expert_that_nobody_chose_is_never_read():
    rng = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(9, 32, generator=rng, device=DEVICE)
    logits = torch.randn(9, 4, generator=rng, device=DEVICE)
    logits[:, 2] = -1e9
    gate_up = torch.randn(4, 32, 32, generator=rng, device=DEVICE)
    down = torch.randn(4, 32, 16, generator=rng, device=DEVICE)
    gate_up[2], down[2] = float("nan"), float("nan")
    out = moe(x, logits, gate_up, down, 2, normalize=True)
    assert torch.isfinite(out).all()
