"""Products with weights that stay packed, against plain torch in float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_quantized import widen_grouped
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.fallback import PlainOps
from pagedcore_kernels.packed_codes import E2M1
from pagedcore_kernels.packed_layout import Packed, pack, unpack
from pagedcore_kernels.packed_linear import linear
from pagedcore_kernels.packed_plans import (
    MAX_PACKED_ROWS,
    PackedPlan,
    choose_plan,
    fit,
    is_plan,
)
from pagedcore_kernels.packed_widen import multiply_widened, widen
from pagedcore_kernels.small_linear import Scratch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NUMBERS = [0.1 * i**2 - 3 for i in range(16)]


def draw(n, k, bits, group, kind=None, dtype=torch.float16, seed=0):
    """A weight [n, k] of random codes."""
    generator = torch.Generator().manual_seed(seed)
    groups = (n, k // group)
    codes = torch.randint(256, (n, k * bits // 8), dtype=torch.uint8, generator=generator)
    zero = torch.randint(2**bits, groups, dtype=torch.uint8, generator=generator)
    scale = (torch.rand(groups, generator=generator) + 0.5).to(dtype)
    tables = {"float4": E2M1, "table": NUMBERS}
    weight = Grouped(
        codes=codes.to(DEVICE),
        scale=scale.to(DEVICE),
        bits=bits,
        zero=zero.to(DEVICE) if kind == "zeros" else None,
        minimum=torch.randn(groups, generator=generator).to(DEVICE) if kind == "minima" else None,
        table=torch.tensor(tables[kind], device=DEVICE) if kind in tables else None,
    )
    assert weight.shape == (n, k)
    return weight


def rows(m, k, dtype=torch.float32, seed=1):
    values = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def assert_is_product(out, x, weight, bias=None):
    expected = x.double() @ widen_grouped(weight, torch.float32).double().T
    if bias is not None:
        expected += bias.double()
    assert out.dtype == x.dtype
    assert out.shape == expected.shape
    assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[x.dtype]


KINDS = [
    (4, 128, None, torch.float16),
    (4, 128, "zeros", torch.bfloat16),
    (4, 256, "zeros", torch.float32),
    (4, 64, "table", torch.float32),
    (4, 32, "float4", torch.float16),
    (4, 32, "minima", torch.float16),
    (4, 16, "zeros", torch.float16),
    (8, 64, "zeros", torch.float16),
    (8, 32, "minima", torch.float32),
    (8, 16, None, torch.float32),
]
PLANS = [
    PackedPlan(32, 1, 1),
    PackedPlan(16, 2, 1),
    PackedPlan(16, 1, 3),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_packed_weight_is_unpacked_as_it_was(kind):
    bits, group, name, dtype = kind
    weight = draw(21, 2 * max(group, 48), bits, group, name, dtype)
    packed = pack(weight)
    assert packed is not None
    assert packed.shape == weight.shape
    assert packed.group == weight.group
    restored = unpack(packed)
    for part in ("codes", "scale", "zero", "minimum"):
        was, found = getattr(weight, part), getattr(restored, part)
        assert (was is None) == (found is None)
        if was is not None:
            assert torch.equal(was, found)
            assert was.dtype == found.dtype


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_format_is_multiplied_in_registers_and_by_way_of_x_s_type(kind):
    bits, group, name, dtype = kind
    n, k, plan = 21, 2 * max(group, 48), PLANS[KINDS.index(kind) % 2 + 1]
    weight, bias = draw(n, k, bits, group, name, dtype), rows(1, n)[0]
    packed, x = pack(weight), rows(3, k)
    scratch = Scratch(torch.device(DEVICE))
    assert_is_product(linear(x, packed, bias, scratch, plan=plan), x, weight, bias)
    assert not scratch.arrivals.any()
    assert_is_product(multiply_widened(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 256), (9, 37, 640), (130, 5, 128)])
def test_rows_of_any_number_times_a_scale_for_each_output(plan, m, n, k):
    weight, x = draw(n, k, 4, k, "zeros"), rows(m, k, torch.float16)
    assert_is_product(linear(x, pack(weight), None, Scratch(x.device), plan=plan), x, weight)


@pytest.mark.parametrize(("bits", "group", "kind"), [(4, 64, "minima"), (8, 128, "zeros")])
@pytest.mark.parametrize("plan", PLANS[1:], ids=str)
def test_a_step_may_take_half_of_each_quarter(plan, bits, group, kind):
    weight, x = draw(21, 640, bits, group, kind), rows(3, 640)
    for quarter in (32, 64):
        out = linear(x, pack(weight, quarter), plan=replace(plan, halves=True))
        assert_is_product(out, x, weight)
        out = linear(
            x, pack(weight, quarter), None, Scratch(x.device), plan=replace(plan, halves=True)
        )
        assert_is_product(out, x, weight)


def test_without_scratch_inputs_are_not_cut_between_programs():
    weight, x = draw(16, 512, 4, 128), rows(2, 512)
    assert_is_product(linear(x, pack(weight), plan=PackedPlan(16, 1, 4)), x, weight)


def test_rows_may_be_strided_and_padding_is_never_read():
    backing = torch.full((3, 200), torch.nan, device=DEVICE)
    backing[:, :160] = rows(3, 160)
    weight, x = draw(20, 160, 4, 32), backing[:, :160]
    assert_is_product(linear(x, pack(weight), plan=PackedPlan(32)), x, weight)


def test_one_bad_row_leaves_the_others_alone():
    weight, x = pack(draw(24, 128, 4, 64)), rows(4, 128)
    expected = linear(x, weight, plan=PackedPlan(32))
    x[2] = torch.nan
    out = linear(x, weight, plan=PackedPlan(32))
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3]], expected[[0, 1, 3]])


def test_a_piece_of_a_weight_is_widened_alone():
    weight = draw(70, 64, 4, 32, "zeros")
    whole = widen_grouped(weight, torch.float32)
    assert torch.equal(widen(pack(weight), 17, 40, torch.float32), whole[17:57])


def test_a_large_weight_is_widened_in_pieces(monkeypatch):
    monkeypatch.setattr("pagedcore_kernels.packed_widen.PIECE", 64 * 16)
    monkeypatch.setattr("pagedcore_kernels.packed_widen.ALIGNED_ROWS", 8)
    weight, x, bias = draw(40, 64, 8, 32), rows(5, 64), rows(1, 40)[0]
    assert_is_product(multiply_widened(x, pack(weight), bias), x, weight, bias)


def test_no_rows_make_no_product():
    assert linear(rows(0, 64), pack(draw(20, 64, 4, 32)), plan=PackedPlan()).shape == (0, 20)


def test_groups_without_a_layout_are_left_to_plain_torch():
    ops = TritonOps(DEVICE)
    weight, x = draw(20, 96, 4, 48), rows(2, 96)
    assert ops.pack_grouped(weight, x.dtype) is weight
    assert_is_product(ops.grouped_linear(x, weight), x, weight)


def test_the_backend_multiplies_columns_in_the_weights_order():
    ops, order = TritonOps(DEVICE), torch.randperm(64, device=DEVICE)
    weight, x = replace(draw(20, 64, 4, 32), order=order), rows(2, 64)
    packed = ops.pack_grouped(weight, x.dtype)
    assert isinstance(packed, Packed)
    assert_is_product(ops.grouped_linear(x, packed), x[:, order], weight)


def test_where_the_kernel_does_not_compile_plain_torch_reads_a_packed_weight():
    weight, x = draw(20, 64, 4, 32, "zeros"), rows(2, 64)
    got = PlainOps(DEVICE).grouped_linear(x, pack(weight))
    torch.testing.assert_close(got, PlainOps(DEVICE).grouped_linear(x, weight))


def test_few_rows_have_plans_and_prompts_have_none():
    for n, k in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (576, 576)]:
        for m, quarter in product((1, 3, 16, 33, 64), (16, 32, 64)):
            plan = choose_plan(m, n, k, quarter)
            assert plan is not None
            assert is_plan(plan)
            assert plan.parts * plan.slices <= max(1, k // (4 * quarter))
        assert choose_plan(MAX_PACKED_ROWS + 1, n, k) is None
    assert choose_plan(128, 28672, 4096) is not None
    assert choose_plan(128, 4096, 14336) is not None
    assert choose_plan(128, 4096, 4096) is None  # what is small is widened sooner


@pytest.mark.parametrize("room", [232_448, 166_912, 101_376])
def test_a_plan_is_cut_down_to_the_shared_memory_of_the_device(room):
    wide = 4 * (32 * 136 + 16 * 512)  # a stage of a block of 256 inputs and of 16 rows
    plan = fit(PackedPlan(32, 4, 1, 4, 6), 16, 136, 512, room)
    assert 2 <= plan.num_stages < 6
    assert (plan.num_stages - 1) * wide <= room < plan.num_stages * wide
    assert fit(PackedPlan(32, 4, 1, 4, 3), 1, 68, 256, room) == PackedPlan(32, 4, 1, 4, 3)
    largest = fit(PackedPlan(128, 1, 1, 8, 4), 128, 136, 512, room)
    assert largest == (PackedPlan(128, 1, 1, 8, 3) if room > 200_000 else largest)
    assert (largest is None) == (room < 148_480)


def test_a_weight_that_is_only_described_is_packed_into_a_description():
    weight = Grouped(
        codes=torch.empty((32, 128), dtype=torch.uint8, device="meta"),
        scale=torch.empty((32, 1), dtype=torch.float16, device="meta"),
        bits=4,
    )
    packed = pack(weight)
    assert packed is not None
    assert packed.codes.is_meta
    assert packed.num_bytes == 32 * 128 + 32 * 4
