"""Weights of 4 bits that stream through registers, against plain torch in float64.

The kernel has no interpreter: here it is compiled (`test_products_and_draws_compile`), and what it
computes is compared on a GPU.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_quantized import widen_grouped
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.packed_codes import E2M1
from pagedcore_kernels.packed_layout import pack
from pagedcore_kernels.packed_strips import MAX_ROWS, PROCESSORS, StripPlan, choose, linear
from pagedcore_kernels.small_linear import Scratch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


def on_gpu(test):
    missing = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
    return pytest.mark.gpu(missing(test))


def described(n, k, bits=4, group=128, **more):
    """A packed weight [n, k] without its bytes."""

    def of_groups(dtype):
        return torch.empty((n, k // group), dtype=dtype, device="meta")

    if more.pop("minima", False):
        more["minimum"] = of_groups(torch.float32)
    codes = torch.empty((n, k * bits // 8), dtype=torch.uint8, device="meta")
    return pack(Grouped(codes, of_groups(torch.float16), bits, **more))


def draw(n, k, group, *, zeros=False, scale_dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = (n, k // group)
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scale = ((torch.rand(groups, generator=generator) + 0.5) * 0.01).to(scale_dtype)
    zero = torch.randint(16, groups, dtype=torch.uint8, generator=generator)
    return Grouped(codes.to(DEVICE), scale.to(DEVICE), 4, zero=zero.to(DEVICE) if zeros else None)


def rows(m, k, dtype, seed=1):
    values = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def assert_is_product(out, x, weight, bias=None):
    expected = x.double() @ widen_grouped(weight, torch.float32).double().T
    if bias is not None:
        expected += bias.double()
    assert out.dtype == x.dtype
    assert out.shape == expected.shape
    assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[x.dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", [1, 8, 16])
def test_a_plan_covers_all_inputs_and_all_strips(shape, m):
    weight = described(*shape)
    plan = choose(m, weight, torch.bfloat16)
    if m > 8 and shape[1] > 4096:
        assert plan is None  # joining parts of so many sums costs more than it gains
        return
    num_strips, num_blocks = weight.codes.shape[:2]
    assert plan.slices * plan.blocks * plan.parts == num_blocks
    runs = -(-num_strips // (plan.strips * plan.steps))
    assert num_strips % plan.strips == 0
    assert (runs - 1) * plan.strips * plan.steps < num_strips
    assert runs * plan.parts <= 2 * PROCESSORS


@pytest.mark.parametrize(
    "weight",
    [
        described(64, 4096, bits=8),
        described(64, 4096, minima=True, group=64),
        described(64, 4096, table=torch.tensor(E2M1)),
        described(64, 4096, group=4096),
        described(64, 4096, group=16),
        described(64, 4096, group=512),
        described(64, 4224),
        described(64, 256 * 43),
    ],
    ids=["8 bits", "minima", "table", "one group", "groups of 16", "groups of 512", "tail", "odd"],
)
def test_what_has_no_plan_is_left_to_the_other_kernel(weight):
    assert choose(4, weight, torch.bfloat16) is None


def test_so_are_more_rows_no_rows_and_float32():
    weight = described(64, 4096)
    assert choose(MAX_ROWS, weight, torch.float16) is not None
    assert choose(MAX_ROWS + 1, weight, torch.float16) is None
    assert choose(0, weight, torch.float16) is None
    assert choose(4, weight, torch.float32) is None


KINDS = list(product([32, 64, 128, 256], [False, True], [torch.float16, torch.float32]))


@on_gpu
@pytest.mark.parametrize(("group", "zeros", "scale_dtype"), KINDS, ids=str)
@pytest.mark.parametrize(
    ("m", "dtype"), [(1, torch.bfloat16), (7, torch.float16), (13, torch.bfloat16)]
)
def test_each_format_is_multiplied(group, zeros, scale_dtype, m, dtype):
    n, k = 277, 4096
    weight, bias = draw(n, k, group, zeros=zeros, scale_dtype=scale_dtype), rows(1, n, dtype)[0]
    packed, x, scratch = pack(weight), rows(m, k, dtype), Scratch(torch.device(DEVICE))
    plan = choose(m, packed, dtype)
    assert plan is not None
    poison = torch.full((m, n), torch.nan, dtype=dtype, device=DEVICE)
    del poison
    for dependent in (False, True):
        out = linear(x, packed, bias, scratch, plan, dependent=dependent)
        assert_is_product(out, x, weight, bias)


@on_gpu
@pytest.mark.parametrize("quarter", [32, 64])
@pytest.mark.parametrize("m", [3, 8, 9, 16])
def test_any_cut_gives_the_product_again_and_again(quarter, m):
    n, k = 16 * 21, 256 * 28
    weight, x = draw(n, k, 128, zeros=True), rows(m, k, torch.bfloat16)
    packed, scratch = pack(weight, quarter), Scratch(torch.device(DEVICE))
    per_warp = 256 // (4 * quarter)
    plans = [
        StripPlan(4, per_warp, 7, 1, 5),
        StripPlan(4, per_warp, 7, 3, 2),
        StripPlan(4, per_warp, 7, 1, 21, 128),
    ]
    for plan in plans:
        first = linear(x, packed, None, scratch, plan)
        assert_is_product(first, x, weight)
        assert not scratch.arrivals.any()
        assert torch.equal(linear(x, packed, None, scratch, plan), first)


@on_gpu
def test_rows_may_be_strided_and_others_are_never_read():
    backing = torch.full((5, 3000), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    backing[:3, :2048] = rows(3, 2048, torch.bfloat16)
    weight, x = draw(64, 2048, 128), backing[:3, :2048]
    packed = pack(weight)
    plan = choose(3, packed, x.dtype)
    assert_is_product(linear(x, packed, None, Scratch(x.device), plan), x, weight)


@on_gpu
def test_one_bad_row_leaves_the_others_alone():
    packed, x = pack(draw(64, 2048, 128)), rows(4, 2048, torch.bfloat16)
    plan, scratch = choose(4, packed, x.dtype), Scratch(x.device)
    expected = linear(x, packed, None, scratch, plan)
    x[2] = torch.nan
    out = linear(x, packed, None, scratch, plan)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3]], expected[[0, 1, 3]])


@on_gpu
def test_a_large_input_costs_no_more_than_rounding_does():
    weight, x = draw(64, 4096, 128), rows(2, 4096, torch.bfloat16)
    x[:, 77] *= 1000
    packed = pack(weight)
    out = linear(x, packed, None, Scratch(x.device), choose(2, packed, x.dtype))
    assert_is_product(out, x, weight)


@on_gpu
@pytest.mark.parametrize("m", [2, 16])
def test_the_backend_multiplies_columns_in_the_weights_order(m):
    ops, order = TritonOps(DEVICE), torch.randperm(4096, device=DEVICE)
    weight, x = replace(draw(48, 4096, 128), order=order), rows(m, 4096, torch.bfloat16)
    packed = ops.pack_grouped(weight, x.dtype)
    assert choose(m, packed, x.dtype) is not None
    assert_is_product(ops.grouped_linear(x, packed), x[:, order], weight)
