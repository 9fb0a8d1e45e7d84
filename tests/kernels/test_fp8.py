"""Rounding to 8 bits, alone and in fused kernels, against plain torch."""

import pytest
import torch

from pagedcore.execution.quantized import FLOAT8, Quantized
from pagedcore.execution.torch_ops import TorchOps
from pagedcore_kernels import fp8
from pagedcore_kernels.backend import TritonOps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = TorchOps(DEVICE)


def on_gpu(case):
    """The interpreter does not know NaN of 8 bits, and has no scaled product."""
    missing = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
    return pytest.param(case, marks=[pytest.mark.gpu, missing])


def random(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def assert_is_rounded(quantized, exact, *, on_gpu=DEVICE == "cuda"):
    """Each value lies within half a step of FLOAT8 of the exact one.

    Triton's interpreter never carries into the exponent: there, one in sixteen is wrong.
    """
    assert isinstance(quantized, Quantized)
    assert quantized.values.dtype == FLOAT8
    assert quantized.scale.shape == (len(exact), 1)
    exact = exact.double()
    largest = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(quantized.scale.double(), largest / 448, rtol=1e-6, atol=0)
    error = (quantized.values.double() * quantized.scale.double() - exact).abs()
    step = torch.maximum(exact.abs() * 2.0**-3, largest / 448 * 2.0**-9)
    is_near = error <= step / 2 * (1 + 1e-5)
    assert is_near.all() if on_gpu else is_near.double().mean() > 0.85


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 64), (5, 200), (2, 1025)])
def test_rows_are_rounded_to_their_largest_magnitude(rows, columns, dtype):
    x = random(rows, columns, dtype=dtype)
    quantized = fp8.quantize(x)
    assert quantized.dtype == dtype
    assert_is_rounded(quantized, x)
    assert_is_rounded(PLAIN.quantize(x), x, on_gpu=True)


def test_numbers_that_8_bits_can_hold_stay_as_they_are():
    x = (random(6, 300) * 100).clamp(-400, 400).to(FLOAT8).float()
    x[:, 0] = 448
    scale = torch.tensor([1.0, 2.0, 0.125, 1024.0, 2.0**-20, 1.0], device=DEVICE)[:, None]
    quantized = fp8.quantize(x * scale)
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.values.float(), x)


def test_rows_may_be_strided_and_padding_is_never_read():
    backing = torch.full((4, 100), torch.nan, device=DEVICE)
    backing[:, :72] = random(4, 72)
    assert_is_rounded(fp8.quantize(backing[:, :72]), backing[:, :72])


def test_zeros_stay_zero():
    for quantize in (fp8.quantize, PLAIN.quantize):
        assert not quantize(torch.zeros(2, 40, device=DEVICE)).values.float().any()


@pytest.mark.parametrize("quantize", [PLAIN.quantize, on_gpu(fp8.quantize)])
def test_bad_rows_stay_visible(quantize):
    x = random(4, 40)
    x[1, 7] = torch.nan
    x[2, 9] = torch.inf
    quantized = quantize(x)
    wide = quantized.values.float() * quantized.scale
    assert wide[[0, 3]].isfinite().all()
    assert not wide[1].isfinite().all()
    assert not wide[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_comes_rounded_and_its_sum_whole(dtype):
    x, residual = random(3, 96, dtype=dtype), random(3, 96, seed=1, dtype=dtype)
    weight = random(96, seed=2, dtype=dtype)
    total = (x.float() + residual.float()).to(dtype)
    exact = total.double()
    exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    quantized, out = fp8.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(out, total)
    assert_is_rounded(quantized, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_activation_comes_rounded(dtype):
    gate_up = random(3, 180, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    quantized = fp8.silu_mul(gate_up)
    assert quantized.dtype == dtype
    assert_is_rounded(quantized, torch.nn.functional.silu(gate) * up)


def test_no_rows_are_rounded_to_none():
    assert fp8.quantize(random(0, 16)).values.shape == (0, 16)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rows", [1, 4, 70])
def test_both_backends_multiply_alike(rows, groups):
    x, bias = random(rows, 256), random(48, seed=3)
    quantized = PLAIN.quantize(random(48, 256, seed=1))
    scale = quantized.scale * torch.tensor([1.0, 2.5], device=DEVICE)[:groups]
    got = TritonOps(DEVICE).scaled_linear(x, quantized.values, scale, bias)
    want = PLAIN.scaled_linear(x, quantized.values, scale, bias)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_plain_torch_takes_rows_that_were_rounded():
    x, weight = random(3, 64), PLAIN.quantize(random(8, 64, seed=1))
    rounded = PLAIN.quantize(x)
    wide = rounded.values.float() * rounded.scale
    torch.testing.assert_close(
        PLAIN.scaled_linear(rounded, weight.values, weight.scale),
        PLAIN.scaled_linear(wide, weight.values, weight.scale),
    )


@pytest.mark.parametrize("rows", [on_gpu(65), on_gpu(256)])
def test_many_rows_are_rounded_and_multiplied_in_8_bits(rows):
    ops = TritonOps(DEVICE)
    x = random(rows, 512, dtype=torch.bfloat16)
    weight = PLAIN.quantize(random(256, 512, seed=1, dtype=torch.bfloat16))
    assert ops.wants_quantized(rows, weight.values, weight.scale, x.dtype)
    rounded = ops.quantize(x)
    exact = (rounded.values.double() * rounded.scale.double()) @ (
        weight.values.double() * weight.scale.double()
    ).T
    for given in (x, rounded):
        got = ops.scaled_linear(given, weight.values, weight.scale).double()
        assert (got - exact).norm() / exact.norm() < 4e-3
