"""Mixtures of experts that stay packed, against the plain definition in float64."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from pagedcore.execution.expert_ops import Clamp, Experts, Routing
from pagedcore.execution.quantized import FLOAT8, Grouped, rows_of
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.execution.torch_quantized import widen_grouped
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.expert_plans import ExpertPlan, candidate_plans, choose_plan, fit
from pagedcore_kernels.fallback import PlainOps
from pagedcore_kernels.packed_codes import E2M1
from pagedcore_kernels.packed_experts import PackedExperts, moe, pack_experts, unpack_expert
from pagedcore_kernels.packed_layout import POWERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
NUMBERS = [0.1 * i**2 - 3 for i in range(16)]
KINDS = {
    "mxfp4": dict(bits=4, group=32, scale_dtype=POWERS, table=E2M1),
    "4 bits": dict(bits=4, group=32),
    "4 bits, whole rows, zeros": dict(bits=4, group=0, zeros=True),
    "4 bits, zeros": dict(bits=4, group=64, zeros=True, scale_dtype=torch.bfloat16),
    "4 bits, minima": dict(bits=4, group=32, minima=True),
    "table": dict(bits=4, group=64, table=NUMBERS, scale_dtype=torch.float32),
    "8 bits": dict(bits=8, group=16, scale_dtype=torch.float32),
    "8 bits, zeros": dict(bits=8, group=64, zeros=True),
    "float8": dict(bits=8, group=0, float8=True, scale_dtype=torch.float32),
    "float8, blocks": dict(bits=8, group=64, float8=True, scale_dtype=torch.float32),
}
SMALL = ExpertPlan(8, 64, 4, 2)
WIDE = ExpertPlan(16, 64, 4, 3, scaled=True)


def stack(rng, rows, k, kind):
    """A weight [rows, k] of random codes; what they stand for is about as large as 1 / sqrt(k)."""
    settings = KINDS[kind]
    groups = rows, k // (settings["group"] or k)
    bits, dtype = settings["bits"], settings.get("scale_dtype", torch.float16)
    codes = torch.randint(256, (rows, k * bits // 8), dtype=torch.uint8, generator=rng)
    if settings.get("float8"):
        codes = (torch.randn(rows, k, generator=rng) * 30).to(FLOAT8).view(torch.uint8)
    if dtype == POWERS:
        scale = torch.randint(121, 125, groups, dtype=torch.uint8, generator=rng).view(POWERS)
    else:
        size = 30 if settings.get("float8") else {4: 4, 8: 74}[bits]
        scale = ((torch.rand(groups, generator=rng) + 0.5) / (size * k**0.5)).to(dtype)
    zero = torch.randint(2**bits, groups, dtype=torch.uint8, generator=rng)
    minimum, table = torch.randn(groups, generator=rng) * 0.1, settings.get("table")
    return Grouped(
        codes=codes.to(DEVICE),
        scale=scale.to(DEVICE),
        bits=bits,
        zero=zero.to(DEVICE) if settings.get("zeros") else None,
        minimum=minimum.to(DEVICE) if settings.get("minima") else None,
        table=torch.tensor(table, device=DEVICE) if table else None,
        float8=settings.get("float8", False),
    )


def draw(kind, num_experts, h, width, *, clamped=False, seed=0):
    rng = torch.Generator().manual_seed(seed)
    experts = Experts(
        gate_up=stack(rng, num_experts * 2 * width, h, kind),
        down=stack(rng, num_experts * h, width, kind),
    )
    if clamped:
        experts.gate_up_bias = torch.randn(num_experts, 2 * width, generator=rng).to(DEVICE)
        experts.down_bias = torch.randn(num_experts, h, generator=rng).to(DEVICE)
        experts.clamp = Clamp(alpha=1.702, limit=1.5)
    return experts


def rows(num, h, num_experts, num_chosen, dtype=torch.float32, seed=1):
    """Rows, the weights of their experts, and which those are."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(num, h, generator=rng).to(dtype).to(DEVICE)
    scores = torch.randn(num, num_experts, generator=rng).to(DEVICE)
    return x, *TorchOps(DEVICE).route(scores, Routing(num_chosen=num_chosen, normalize=True))


def reference(x, weights, chosen, experts):
    """By the definition, one token at one expert after the other, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    _, h, width = experts.shape
    for e in chosen.unique().tolist():
        matrices = (
            widen_grouped(rows_of(part, slice(e * size, (e + 1) * size)), torch.float32).double()
            for part, size in ((experts.gate_up, 2 * width), (experts.down, h))
        )
        gate_up, down = matrices
        for t, c in torch.nonzero(chosen == e).tolist():
            inner = gate_up @ x[t].double()
            if experts.gate_up_bias is not None:
                inner += experts.gate_up_bias[e]
            gate, up = inner.chunk(2)
            if experts.clamp is None:
                inner = silu(gate) * up
            else:
                limit = experts.clamp.limit
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                inner = gate * torch.sigmoid(experts.clamp.alpha * gate) * (up + 1)
            result = down @ inner
            if experts.down_bias is not None:
                result += experts.down_bias[e]
            out[t] += weights[t, c].double() * result
    return out


def assert_mixes(drawn, experts, plan=None):
    packed = pack_experts(experts, drawn[0].dtype)
    assert isinstance(packed, PackedExperts)
    got, want = moe(*drawn, packed, plan), reference(*drawn, experts)
    assert got.dtype == drawn[0].dtype
    assert (got.double() - want).norm() / want.norm() < TOLERANCE[got.dtype]
    return got


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is allocated holds NaN, so that a number that nobody writes shows."""
    empty = torch.empty

    def poison(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr("pagedcore_kernels.packed_experts.torch.empty", poison)


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_mixes_as_the_plain_definition_says(kind):
    clamped = list(KINDS).index(kind) % 2 == 0
    drawn = rows(3, 64, 4, 2)
    assert_mixes(drawn, draw(kind, 4, 64, 64 if clamped else 192, clamped=clamped), SMALL)


@pytest.mark.parametrize("plan", [SMALL, WIDE], ids=["sums", "weights"])
@pytest.mark.parametrize(("num", "h", "width"), [(1, 96, 160), (21, 32, 96), (30, 160, 32)])
def test_any_sizes_and_any_number_of_rows_are_mixed(num, h, width, plan):
    drawn = rows(num, h, 3, 2, torch.float16 if num == 21 else torch.float32)
    assert_mixes(drawn, draw("mxfp4", 3, h, width, clamped=num == 21), plan)


def test_experts_whose_outputs_do_not_fill_strips_are_padded():
    experts = draw("float8", 3, 40, 20)
    assert_mixes(rows(7, 40, 3, 2), experts, SMALL)
    packed = pack_experts(experts, torch.float32)
    assert packed.gate_up.shape == (3 * 48, 40)
    assert packed.down.shape == (3 * 48, 20)


@pytest.mark.parametrize("kind", ["mxfp4", "4 bits, zeros", "4 bits, minima", "float8"])
def test_an_expert_is_unpacked_as_it_was(kind):
    experts = draw(kind, 3, 128, 64, clamped=True)
    x_type = torch.float32
    packed = pack_experts(experts, x_type)
    for e in range(3):
        got = unpack_expert(packed, e, x_type)
        want = TorchOps(DEVICE).one_expert(experts, e, x_type)
        for part in ("gate_up", "down"):
            assert torch.equal(getattr(got, part), widen_grouped(getattr(want, part), x_type)), part
            part = f"{part}_bias"
            assert torch.equal(getattr(got, part), getattr(want, part)), part


def test_where_the_kernel_does_not_compile_plain_torch_reads_packed_experts():
    experts, drawn = draw("mxfp4", 4, 64, 96, clamped=True), rows(5, 64, 4, 2)
    packed = pack_experts(experts, torch.float32)
    got = PlainOps(DEVICE).moe(*drawn, packed)
    torch.testing.assert_close(got, TorchOps(DEVICE).moe(*drawn, experts), atol=1e-6, rtol=1e-5)


def test_an_expert_that_nobody_chose_is_never_read():
    experts, (x, weights, chosen) = draw("mxfp4", 4, 64, 96), rows(6, 64, 3, 2)
    experts.down.scale.view(torch.uint8)[3 * 64 :] = 255  # NaN
    assert torch.isfinite(moe(x, weights, chosen, pack_experts(experts, x.dtype), SMALL)).all()


@pytest.mark.parametrize("kind", ["mxfp4", "float8"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes
def test_what_is_no_number_stays_none(kind):
    experts, (x, weights, chosen) = draw(kind, 2, 64, 64), rows(3, 64, 2, 1)
    if kind == "mxfp4":
        experts.down.scale.view(torch.uint8)[5] = 255
    else:
        experts.down.codes[5, 7] = 127
    out = moe(x, weights, chosen, pack_experts(experts, x.dtype), SMALL)
    hit = chosen[:, 0] == 0
    assert out[hit, 5].isnan().all()
    assert torch.isfinite(out[~hit]).all()
    assert torch.isfinite(out[:, :5]).all()


def test_the_same_rows_are_mixed_to_the_same_bits_in_any_company():
    packed = pack_experts(draw("mxfp4", 4, 64, 96), torch.float32)
    x, weights, chosen = rows(6, 64, 4, 2)
    whole = moe(x, weights, chosen, packed, SMALL)
    alone = moe(x[4:5].contiguous(), weights[4:5], chosen[4:5], packed, SMALL)
    assert torch.equal(whole[4:5], alone)


def test_packed_experts_have_the_bytes_that_their_format_promises():
    packed = pack_experts(draw("mxfp4", 4, 256, 128), torch.bfloat16)
    numbers = 4 * 3 * 256 * 128
    assert packed.gate_up.num_bytes + packed.down.num_bytes == numbers * 17 // 32
    packed = pack_experts(draw("float8", 4, 256, 128), torch.bfloat16)
    num_scales = 4 * (2 * 128 + 256)
    assert packed.gate_up.num_bytes + packed.down.num_bytes == numbers + 4 * num_scales


def test_groups_without_a_layout_are_widened_and_tensors_left_alone():
    ops, drawn = TritonOps(DEVICE), rows(4, 96, 3, 2)
    rng = torch.Generator().manual_seed(3)
    parts = [stack(rng, size, 96, "8 bits") for size in (3 * 192, 3 * 96)]
    for part in parts:
        part.scale = part.scale[:, :2].contiguous()  # groups of 48
    experts = Experts(gate_up=parts[0], down=parts[1])
    wide = ops.pack_experts(experts, torch.float32)
    assert wide.gate_up.shape == (3, 192, 96)
    assert ops.pack_experts(wide, torch.float32) is wide
    got, want = ops.moe(*drawn, wide), reference(*drawn, experts)
    assert (got.double() - want).norm() / want.norm() < 1e-5


def test_the_backend_mixes_packed_experts_by_the_plan_of_their_number():
    ops, experts = TritonOps(DEVICE), draw("mxfp4", 4, 64, 32)
    packed = ops.pack_experts(experts, torch.float32)
    for num in (1, 12):
        drawn = rows(num, 64, 4, 2)
        got, want = ops.moe(*drawn, packed), reference(*drawn, experts)
        assert (got.double() - want).norm() / want.norm() < 1e-5


def test_plans_grow_with_the_assignments_and_are_tried_first():
    numbers = [4, 64, 256, 1024, 4096, 65536]
    plans = [choose_plan(num, 32) for num in numbers]
    assert [plan.bm for plan in plans] == sorted(plan.bm for plan in plans)
    for num, plan in zip(numbers, plans, strict=True):
        assert next(iter(candidate_plans(num, 32))) == plan


@pytest.mark.parametrize("room", [232_448, 166_912, 101_376])
def test_a_plan_is_cut_down_to_the_shared_memory_of_the_device(room):
    for num in (1, 300, 9000):
        plan = choose_plan(num, 32)
        found = fit(plan, 68, 256, room)
        assert found.num_stages * (found.bn * 68 + found.bm * 256) <= room
        assert found == plan or room < 200_000
    smallest = ExpertPlan(8, 32, 4, 2)
    assert fit(smallest, 68, 256, 1000) == smallest


def on_gpu(test):
    """Mark a test that needs a CUDA device, for shapes that the interpreter is too slow for."""
    missing = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
    return pytest.mark.gpu(missing(test))


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [1, 7, 40, 130, 600])
def test_each_format_and_every_plan_of_real_sizes_in_bfloat16(kind, num):
    if kind == "mxfp4":
        experts = draw(kind, 8, 2880, 2880, clamped=True)
        for part in ("gate_up_bias", "down_bias"):
            setattr(experts, part, getattr(experts, part).bfloat16())
    else:
        experts = draw(kind, 8, 2048, 768)
    x, weights, chosen = rows(num, experts.shape[1], 8, 4, torch.bfloat16)
    packed = pack_experts(experts, x.dtype)
    exact = replace(
        experts,
        gate_up_bias=None if experts.clamp is None else experts.gate_up_bias.float(),
        down_bias=None if experts.clamp is None else experts.down_bias.float(),
    )
    want = TorchOps(DEVICE).moe(x.float(), weights, chosen, exact)
    for plan in candidate_plans(num * 4, 8):
        got = moe(x, weights, chosen, packed, plan).float()
        assert (got - want).norm() / want.norm() < TOLERANCE[torch.bfloat16], plan
