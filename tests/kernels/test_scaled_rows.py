"""Products of rows that are rounded to 8 bits, too: in groups of columns, and to whole numbers."""

import pytest
import torch

from pagedcore.execution.quantized import FLOAT8
from pagedcore.execution.torch_ops import TorchOps
from pagedcore_kernels import int8
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.block_fp8 import BlockPlan, block_linear, choose_block_plan, quantize_groups
from pagedcore_kernels.small_linear import Scratch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLANS = [BlockPlan(16, 16, 1), BlockPlan(16, 32, 2)]


def random(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def spread(scale, columns):
    """A scale for each of 128 columns: [rows, columns]."""
    return scale.double().repeat_interleave(128, 1)[:, :columns]


@pytest.mark.parametrize("columns", [40, 300, 1280])
def test_each_group_of_a_row_is_rounded_to_its_largest_magnitude(columns):
    x = random(3, columns) * torch.tensor([[1.0], [1e4], [1e-3]], device=DEVICE)
    values, scale = quantize_groups(x)
    assert values.dtype == FLOAT8
    assert scale.shape == (-(-columns // 128), 3)
    largest = torch.stack([piece.abs().amax(1) for piece in x.split(128, 1)])
    torch.testing.assert_close(scale, largest / 448)
    wide = spread(scale.T, columns)
    error = (values.double() * wide - x.double()).abs()
    step = torch.maximum(x.double().abs() * 2.0**-3, wide * 2.0**-9)
    is_near = error <= step / 2 * (1 + 1e-5)
    # triton's interpreter never carries into the exponent: there, one in sixteen is wrong
    assert is_near.all() if DEVICE == "cuda" else is_near.double().mean() > 0.85


def test_there_may_be_room_for_more_rows():
    x = random(5, 200)
    values, scale = quantize_groups(x, multiple=4)
    assert (values.shape, scale.shape) == ((8, 200), (2, 8))
    expected, shares = quantize_groups(x)
    assert torch.equal(values[:5].float(), expected.float())
    assert torch.equal(scale[:, :5], shares)
    weight, of_weight = random(16, 200, seed=2).to(FLOAT8), random(16, 2, seed=3).abs()
    others = (weight, of_weight, None, torch.float32)
    got = block_linear(values[:5], scale[:, :5], *others)
    assert torch.equal(got, block_linear(expected, shares, *others))


def test_zeros_stay_zero():
    values, scale = quantize_groups(torch.zeros(2, 256, device=DEVICE))
    assert not values.float().any()
    assert (scale > 0).all()


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 128), (20, 37, 200), (3, 40, 512)])
def test_a_weight_with_scales_for_blocks_is_multiplied_group_by_group(plan, m, n, k):
    values, scale = random(m, k).to(FLOAT8), random(-(-k // 128), m, seed=1).abs()
    weight, shares = random(n, k, seed=2).to(FLOAT8), random(n, -(-k // 128), seed=3).abs()
    bias, scratch = random(n, seed=4), Scratch(torch.device(DEVICE))
    got = block_linear(values, scale, weight, shares, bias, torch.float32, scratch, plan=plan)
    left, right = values.double() * spread(scale.T, k), weight.double() * spread(shares, k)
    want = left @ right.T + bias
    # the tensor cores keep 14 bits of a sum of float8
    assert (got - want).norm() / want.norm() < (1e-3 if DEVICE == "cuda" else 1e-6)
    assert not scratch.arrivals.any()


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 128), (20, 37, 200), (3, 40, 512)])
def test_whole_numbers_are_summed_exactly(plan, m, n, k):
    x, share, bias = random(m, k), random(n, 1, seed=1).abs(), random(n, seed=2)
    weight = torch.randint(-127, 128, (n, k), generator=torch.Generator().manual_seed(3))
    weight = weight.to(torch.int8).to(DEVICE)
    got = int8.linear(x, weight, share, bias, Scratch(torch.device(DEVICE)), plan=plan)
    torch.testing.assert_close(got, TorchOps(DEVICE).int8_linear(x, weight, share, bias))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("m", [1, 2, 5, 16, 17, 100, 333])
def test_the_backend_multiplies_float8_weights_of_any_groups(m, groups):
    x, bias = random(m, 512, dtype=torch.bfloat16), random(256, seed=1, dtype=torch.bfloat16)
    weight, shares = random(256, 512, seed=2).to(FLOAT8), random(256, groups, seed=3).abs() + 0.1
    got = TritonOps(DEVICE).scaled_linear(x, weight, shares, bias)
    wide = weight.double() * shares.double().repeat_interleave(512 // groups, 1)
    want = x.double() @ wide.T + bias.double()
    assert (got.double() - want).norm() / want.norm() < 0.04


def test_the_backend_multiplies_whole_numbers_of_strided_rows():
    x, share = random(40, 3).T, random(20, 1, seed=1).abs()
    weight = torch.ones((20, 40), dtype=torch.int8, device=DEVICE)
    got = TritonOps(DEVICE).int8_linear(x, weight, share)
    torch.testing.assert_close(got, TorchOps(DEVICE).int8_linear(x, weight, share))


def test_no_rows_make_no_product():
    weight = torch.ones((4, 16), dtype=torch.int8, device=DEVICE)
    assert int8.linear(random(0, 16), weight, random(4, 1)).shape == (0, 4)
    values, scale = quantize_groups(random(0, 16))
    out = block_linear(values, scale, weight.to(FLOAT8), random(4, 1), None, torch.float32)
    assert out.shape == (0, 4)


@pytest.mark.parametrize("m", [1, 17, 64, 65, 4096])
def test_plans_cut_no_more_parts_than_there_are_groups(m):
    for n, k in [(64, 64), (4096, 14336), (28672, 4096)]:
        assert choose_block_plan(m, n, k).parts <= -(-k // 128)
