"""The CPU's kernel for 8 bits times 8 bits against the plain operation, which it equals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.execution.torch_ops import TorchOps

BF16 = torch.bfloat16


def draw(outputs, inputs, seed=0):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=random)
    return weight, torch.rand(outputs, 1, generator=random) + 0.5


def rows(tokens, inputs):
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1)).to(BF16)


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 100),
    words=st.one_of(st.integers(1, 40), st.just(300)),
    tokens=st.one_of(st.integers(0, 30), st.sampled_from([96, 97, 200])),
    size=st.sampled_from([1e-39, 1.0, 1e30]),
)
def test_rows_and_sums_are_those_of_the_plain_operation(native, outputs, words, tokens, size):
    weight, scale = draw(outputs, 4 * words)
    x = rows(tokens, 4 * words) * size
    packed = native.pack_int8(weight, BF16)
    assert packed.shape == weight.shape
    got = native.int8_linear(x, packed, scale)
    assert torch.equal(got, TorchOps("cpu").int8_linear(x, weight, scale))


@pytest.mark.parametrize("tokens", [1, 13])
def test_rounded_rows_come_near_the_exact_product(native, tokens):
    """Each input is off by half of a whole number, 1 / 254 of its row's largest magnitude."""
    weight, scale = draw(70, 96)
    x, bias = rows(tokens, 96), rows(1, 70)[0]
    got = native.int8_linear(x, native.pack_int8(weight, BF16), scale, bias).double()
    wide = weight.double() * scale.double()
    exact = x.double() @ wide.T + bias.double()
    lost = x.double().abs().amax(-1, keepdim=True) / 254 * wide.abs().sum(-1)
    assert ((got - exact).abs() <= 1.001 * lost + exact.abs() * 2.0**-8).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_becomes_nan_alone(native, bad):
    weight, scale = draw(40, 64)
    packed, x = native.pack_int8(weight, BF16), rows(3, 64)
    want = native.int8_linear(x, packed, scale)
    x[1, 50] = bad
    got = native.int8_linear(x, packed, scale)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], want[::2])


@pytest.mark.parametrize(("dtype", "inputs"), [(torch.float32, 32), (BF16, 6)])
def test_other_rows_and_sizes_are_left_to_plain_torch(native, dtype, inputs):
    weight, scale = draw(5, inputs)
    x = rows(3, inputs).to(dtype)
    packed = native.pack_int8(weight, dtype)
    want = TorchOps("cpu").int8_linear(x, weight, scale)
    assert torch.equal(native.int8_linear(x, packed, scale), want)
