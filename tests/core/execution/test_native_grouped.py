"""The CPU's kernel for weights of 4 and 8 bits against what those stand for, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.execution.native import grouped_ops
from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_quantized import widen_grouped

BF16 = torch.bfloat16
KINDS = ["symmetric", "zeros", "minima", "minima in half", "table"]


def draw(kind, bits, outputs, groups, group, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = outputs, groups * group * bits // 8
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    scale = torch.rand(outputs, groups, generator=random) + 0.5
    weight = Grouped(codes, scale.half() if kind != "minima" else scale, bits)
    if kind == "zeros":
        zeros = torch.randint(0, 2**bits, scale.shape, generator=random)
        weight.zero = zeros.to(torch.uint8)
    elif kind == "minima":
        weight.minimum = torch.randn(scale.shape, generator=random) * 2**bits
    elif kind == "minima in half":
        weight.minimum = torch.randn(scale.shape, generator=random).half().float()
    elif kind == "table":
        weight.table = torch.randn(16, generator=random).to(BF16).float()
    return weight


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from([4, 8]),
    outputs=st.integers(1, 100),
    groups=st.integers(1, 5),
    group=st.sampled_from([8, 16, 32, 96, 128, 264, 576]),
    tokens=st.one_of(st.integers(1, 20), st.sampled_from([60, 200])),
    bias=st.booleans(),
    copied=st.booleans(),
)
def test_a_product_with_few_bits_is_that_of_what_they_stand_for(
    native, kind, bits, outputs, groups, group, tokens, bias, copied
):
    if kind == "table":
        bits = 4
    weight = draw(kind, bits, outputs, groups, group)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, groups * group, generator=random).to(BF16)
    added = torch.randn(outputs, generator=random).to(BF16) if bias else None
    native._left_for_copies = grouped_ops.COPIES if copied else 0
    packed = native.pack_grouped(weight, BF16)
    got = native.grouped_linear(x, packed, added)
    wide = widen_grouped(weight, torch.float32).double()
    exact = x.double() @ wide.T + (added.double() if bias else 0)
    assert packed.shape == (outputs, groups * group)
    assert got.dtype == BF16
    # one rounding of the sum, and one of each number where panels are widened
    spread = (x.double().abs() @ wide.abs().T) * 2.0**-8 / (groups * group) ** 0.5
    assert ((got.double() - exact).abs() <= exact.abs() * 2.0**-8 + 4 * spread + 1e-4).all()


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_inputs_in_another_order_are_put_into_it(native, tokens):
    weight = draw("zeros", 4, 40, 4, 32)
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(2)).to(BF16)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    plain = native.grouped_linear(x[:, order], native.pack_grouped(weight, BF16))
    weight.order = order
    assert torch.equal(native.grouped_linear(x, native.pack_grouped(weight, BF16)), plain)


@pytest.mark.parametrize(("dtype", "group"), [(torch.float32, 32), (BF16, 6)])
def test_what_the_kernel_was_not_made_for_is_left_to_plain_torch(native, dtype, group):
    weight = draw("minima", 4, 5, 2, group)
    packed = native.pack_grouped(weight, dtype)
    x = torch.randn(3, 2 * group, generator=torch.Generator().manual_seed(4)).to(dtype)
    want = x @ widen_grouped(weight, dtype).T
    torch.testing.assert_close(native.grouped_linear(x, packed), want)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS[:-1]),
    bits=st.sampled_from([4, 8]),
    outputs=st.integers(1, 70),
    groups=st.integers(1, 4),
    group=st.sampled_from([8, 24, 32, 96, 128, 256]),
    tokens=st.integers(1, 12),
    size=st.sampled_from([1e-25, 1.0, 1e30]),
)
def test_few_rows_lose_less_than_a_number_of_16_bits(
    native, kind, bits, outputs, groups, group, tokens, size
):
    """Each input is off by at most half of a whole number, 2^-16 of its group's magnitude."""
    weight = draw(kind, bits, outputs, groups, group)
    random = torch.Generator().manual_seed(1)
    x = (torch.randn(tokens, groups * group, generator=random) * size).to(BF16)
    native._left_for_copies = 0
    got = native.grouped_linear(x, native.pack_grouped(weight, BF16)).double()
    exact = x.double() @ widen_grouped(weight, torch.float32).double().T
    codes = 2.0**bits * weight.scale.double()
    if weight.minimum is not None:
        codes += weight.minimum.double().abs()
    largest = x.double().abs().view(tokens, groups, group).amax(-1)
    lost = group * largest @ codes.T
    assert ((got - exact).abs() <= exact.abs() * 2.0**-8 + lost * (2.0**-16 + 2.0**-20)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_become_nan(native, bits, bad):
    native._left_for_copies = 0
    packed = native.pack_grouped(draw("symmetric", bits, 40, 3, 32), BF16)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(5)).to(BF16)
    want = native.grouped_linear(x, packed)
    x[1, 70] = bad
    got = native.grouped_linear(x, packed)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], want[::2])


def test_a_row_of_zeros_stays_zero(native):
    native._left_for_copies = 0
    packed = native.pack_grouped(draw("minima", 4, 40, 3, 32), BF16)
    x = torch.zeros(2, 96, dtype=BF16)
    x[1] = 1e-38
    assert not native.grouped_linear(x, packed).any()


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("tokens", [1, 8, 9, 17, 40])
def test_scores_of_a_head_in_few_bits_are_sums_in_float32(native, tokens, copied):
    stored = draw("symmetric", 8, 70, 3, 32)
    native._left_for_copies = grouped_ops.COPIES if copied else 0
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(6)).to(BF16)
    wide = widen_grouped(stored, torch.float32).double()
    packed = native.pack_head(wide.to(BF16), stored)
    got = native.scores(x, wide.to(BF16), packed)
    assert got.dtype == torch.float32
    is_few = tokens <= (grouped_ops._FEWER if copied else grouped_ops._FEW)
    lost = 2.0**-15 if is_few else 2.0**-8  # of the row, or of the panel in bfloat16
    spread = x.double().abs().amax(-1, keepdim=True) * wide.abs().sum(-1)
    assert ((got.double() - x.double() @ wide.T).abs() <= lost * spread).all()


def test_a_head_whose_groups_do_not_fit_is_packed_in_16_bits(native):
    stored = draw("symmetric", 8, 20, 2, 6)
    weight = widen_grouped(stored, BF16)
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(7)).to(BF16)
    plain = native.scores(x, weight, native.pack_head(weight, None))
    assert torch.equal(native.scores(x, weight, native.pack_head(weight, stored)), plain)


def test_copies_end_with_their_budget(native):
    native._left_for_copies = 2 * 64 * 32
    first, second = (native.pack_grouped(draw("symmetric", 4, 64, 1, 32), BF16) for _ in range(2))
    assert first.copy is not None
    assert second.copy is None
