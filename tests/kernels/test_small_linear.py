"""Products of a few rows against plain torch in float64."""

import pytest
import torch

from pagedcore_kernels.small_linear import Scratch, is_faster, linear
from pagedcore_kernels.small_linear_plans import MAX_ROWS, DotPlan, RowPlan, choose_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def assert_is_product(out, x, weight, bias=None):
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    assert out.dtype == x.dtype
    assert out.shape == expected.shape
    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[x.dtype]


ROW_PLANS = [RowPlan(4, 64, 1, 1), RowPlan(8, 128, 4, 2), RowPlan(1, 256, 2, 1)]
DOT_PLANS = [
    DotPlan(16, 32, 1, 1, 4, 2),
    DotPlan(8, 16, 4, 1, 4, 2),
    DotPlan(32, 64, 2, 1, 2, 3),
    DotPlan(16, 32, 1, 3, 4, 2),
    DotPlan(16, 16, 2, 4, 4, 2),
]


@pytest.mark.parametrize("plan", ROW_PLANS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(48, 256), (37, 200), (1, 8), (5, 513)])
def test_one_row_times_a_weight(plan, n, k):
    x, weight, bias = random(1, k), random(n, k, seed=1), random(n, seed=2)
    assert_is_product(linear(x, weight, plan=plan), x, weight)
    assert_is_product(linear(x, weight, bias, plan=plan), x, weight, bias)


@pytest.mark.parametrize("plan", DOT_PLANS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(2, 48, 256), (16, 37, 200), (3, 5, 129), (40, 64, 96)])
def test_a_few_rows_times_a_weight(plan, m, n, k):
    scratch = Scratch(torch.device(DEVICE))
    x, weight, bias = random(m, k), random(n, k, seed=1), random(n, seed=2)
    assert_is_product(linear(x, weight, None, scratch, plan=plan), x, weight)
    assert_is_product(linear(x, weight, bias, scratch, plan=plan), x, weight, bias)
    assert not scratch.arrivals.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 5])
def test_short_floats_are_summed_in_float32_and_rounded_once(m, dtype):
    if m > 1 and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("triton's interpreter multiplies the bits of bfloat16 matrices as integers")
    x, weight = random(m, 2048, dtype=dtype), random(16, 2048, seed=1, dtype=dtype)
    assert_is_product(linear(x, weight), x, weight)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("plan", [None, *ROW_PLANS[:1], *DOT_PLANS], ids=str)
def test_a_float8_weight_is_multiplied_by_its_scales(plan, groups):
    m, n, k = (1 if isinstance(plan, RowPlan) else 7), 37, 300
    scratch = Scratch(torch.device(DEVICE))
    x, bias = random(m, k), random(n, seed=2)
    weight = random(n, k, seed=1).to(torch.float8_e4m3fn)
    scale = random(n, groups, seed=3).abs() + 0.1
    wide = weight.float() * scale.repeat_interleave(k if groups == 1 else 128, 1)[:, :k]
    for given in (scale, scale.T.contiguous().T):
        out = linear(x, weight, bias, scratch, scale=given, plan=plan)
        assert_is_product(out, x, wide, bias)


def test_many_rows_take_several_programs():
    x, weight = random(150, 64), random(24, 64, seed=1)
    assert_is_product(linear(x, weight), x, weight)
    x[40] = torch.nan
    assert linear(x, weight).isnan().any(1).nonzero().tolist() == [[40]]


def test_rows_may_be_strided_and_padding_is_never_read():
    backing = torch.full((3, 100), torch.nan, device=DEVICE)
    backing[:, :72] = random(3, 72)
    x, weight = backing[:, :72], random(20, 72, seed=1)
    assert_is_product(linear(x, weight), x, weight)
    assert_is_product(linear(x[:1], weight), x[:1], weight)


def test_one_bad_row_leaves_the_others_alone():
    x, weight = random(4, 64), random(24, 64, seed=1)
    expected = linear(x, weight)
    x[2] = torch.nan
    out = linear(x, weight)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3]], expected[[0, 1, 3]])


def test_without_scratch_columns_are_not_cut_between_programs():
    x, weight = random(2, 256), random(16, 256, seed=1)
    assert_is_product(linear(x, weight, plan=DotPlan(16, 32, 2, 4, 2, 2)), x, weight)


def test_no_rows_make_no_product():
    assert linear(random(0, 16), random(4, 16)).shape == (0, 4)


def test_plans_exist_for_the_shapes_of_a_decode_step_and_never_for_prompts():
    for n, k in [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (128256, 4096)]:
        assert is_faster(1, n, k)
        assert not is_faster(MAX_ROWS + 1, n, k)
        assert choose_plan(0, n, k) is None
