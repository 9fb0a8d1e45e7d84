"""Norms and the activation against float64, on strided and odd rows."""

import pytest
import torch

from pagedcore_kernels.activation import cap_scores, gelu_mul, silu_mul
from pagedcore_kernels.norms import add_rms_norm, rms_norm

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3}
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 1000), (4, 1536)]


def draw(rows, columns, dtype, device, seed=0):
    """Values in the front of wider rows that hold NaN behind."""
    rng = torch.Generator(device).manual_seed(seed)
    wide = torch.full((rows, columns + 8), torch.nan, dtype=dtype, device=device)
    wide[:, :columns] = torch.randn(rows, columns, generator=rng, device=device)
    return wide[:, :columns]


def norm_of(x, weight, eps):
    x = x.double()
    return x * (x.square().mean(1, keepdim=True) + eps).rsqrt() * weight.double()


def assert_near(got, want, dtype):
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= LIMITS[dtype] * want.norm()


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_normed_and_scaled(shape, dtype, device):
    x = draw(*shape, dtype, device)
    weight = draw(1, shape[1], dtype, device, seed=1)[0]
    before = x.clone()
    assert_near(rms_norm(x, weight, 1e-5), norm_of(x, weight, 1e-5), dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_is_rounded_before_it_is_normed(shape, dtype, device):
    x, residual = draw(*shape, dtype, device), draw(*shape, dtype, device, seed=1)
    weight = draw(1, shape[1], dtype, device, seed=2)[0]
    total = x + residual
    normed, summed = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, total)
    assert_near(normed, norm_of(total, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (5, 128), (2, 3000)])
def test_the_gate_weighs_its_partner(shape, dtype, device):
    gate_up = draw(*shape, dtype, device)
    gate, up = gate_up.double().chunk(2, 1)
    assert_near(silu_mul(gate_up), torch.nn.functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 3000)])
def test_a_gelu_weighs_its_partner(shape, dtype, tanh, device):
    gate_up = 4 * draw(*shape, dtype, device)
    gate, up = gate_up.double().chunk(2, 1)
    want = torch.nn.functional.gelu(gate, approximate="tanh" if tanh else "none") * up
    assert_near(gelu_mul(gate_up, tanh=tanh), want, dtype)


@pytest.mark.parametrize("tanh", [False, True])
def test_a_gelu_of_large_gates_is_the_gate_or_nothing(tanh, device):
    gate = torch.tensor([[-3e4, -40.0, 40.0, 3e4]], device=device)
    out = gelu_mul(torch.cat([gate, torch.ones_like(gate)], 1), tanh=tanh)
    torch.testing.assert_close(out, gate.clamp(min=0), rtol=0, atol=1e-20)


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (2, 2049)])
def test_scores_are_capped_in_float32(shape, dtype, device):
    scores = 20 * draw(*shape, dtype, device)
    want = 30 * torch.tanh(scores.double() / 30)
    assert_near(cap_scores(scores, 30.0), want, torch.float32)


def test_scores_far_beyond_the_cap_are_the_cap_and_nan_stays_nan(device):
    scores = torch.tensor([[-1e9, -3e3, 3e3, 1e9, torch.nan]], device=device)
    out = cap_scores(scores, 30.0)
    torch.testing.assert_close(out[0, :4].tolist(), [-30.0, -30.0, 30.0, 30.0])
    assert out[0, 4].isnan()


def test_a_step_without_tokens_is_empty(device):
    x = torch.empty(0, 16, device=device)
    assert rms_norm(x, torch.ones(16, device=device), 1e-5).shape == (0, 16)
    assert silu_mul(x).shape == (0, 8)
    assert gelu_mul(x, tanh=True).shape == (0, 8)
    assert cap_scores(x, 30.0).shape == (0, 16)
