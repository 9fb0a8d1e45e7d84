"""Scores of 16-bit heads keep the order of the best."""

import pytest
import torch

from pagedcore.execution.torch_ops import TorchOps
from pagedcore.execution.torch_scores import NUM_REFINED


@pytest.mark.parametrize("vocab_size", [3, 50, 1000, 4096, 49152])
@pytest.mark.parametrize("num_seqs", [1, 5])
def test_the_largest_scores_are_those_of_exact_products(vocab_size, num_seqs):
    rng = torch.Generator().manual_seed(vocab_size)
    weight = torch.randn(vocab_size, 96, generator=rng).bfloat16()
    hidden = torch.randn(num_seqs, 96, generator=rng).bfloat16() * 3
    ops = TorchOps("cpu")
    got = ops.scores(hidden, weight, ops.pack_linear(weight))
    want = hidden.double() @ weight.double().t()
    assert got.dtype == torch.float32
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    best = want.topk(min(NUM_REFINED // 2, vocab_size), dim=-1).indices
    torch.testing.assert_close(
        got.gather(1, best).double(), want.gather(1, best), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(got.double(), want, atol=0.5, rtol=0.01)  # 8 bits are left


def test_a_close_call_is_no_tie():
    """In bfloat16 both scores are 20.0, and the lower id would win."""
    weight = torch.zeros(4096, 2, dtype=torch.bfloat16)
    weight[7, 0], weight[9, 0] = 20.0, 20.0
    weight[9, 1] = 0.03
    hidden = torch.ones(1, 2, dtype=torch.bfloat16)
    ops = TorchOps("cpu")
    packed = ops.pack_linear(weight)
    assert ops.linear(hidden, packed).argmax() == 7
    assert ops.scores(hidden, weight, packed).argmax() == 9


def test_a_score_that_is_not_a_number_stays_visible():
    weight = torch.randn(4096, 8).bfloat16()
    hidden = torch.full((2, 8), float("nan"), dtype=torch.bfloat16)
    ops = TorchOps("cpu")
    assert ops.scores(hidden, weight, ops.pack_linear(weight)).isnan().all()
