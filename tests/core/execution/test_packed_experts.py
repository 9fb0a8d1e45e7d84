"""Experts of few bits on the CPU: as their wide weights, of which one is in memory at a time."""

import pytest
import torch

from pagedcore.errors import ConfigError
from pagedcore.execution.expert_ops import Clamp, Experts
from pagedcore.execution.native.ops import NativeOps
from pagedcore.execution.quantized import FLOAT8, Grouped
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.execution.torch_quantized import widen_grouped

E, H, F = 4, 64, 96
FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
KINDS = ["zeros", "minima", "float4", "float8"]


def stack(kind, rows, k):
    generator = torch.Generator().manual_seed(rows)
    groups = rows, k // 32
    codes = torch.randint(256, (rows, k // 2), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(groups, generator=generator) + 0.5).half() / (8 * k**0.5)
    if kind == "zeros":
        zero = torch.randint(16, groups, dtype=torch.uint8, generator=generator)
        return Grouped(codes, scale, 4, zero=zero)
    if kind == "minima":
        minimum = torch.randn(groups, generator=generator) * 0.05
        return Grouped(codes, scale, 4, minimum=minimum)
    if kind == "float4":
        table = torch.tensor([*FLOAT4, *(-number for number in FLOAT4)])
        powers = torch.randint(121, 124, groups, dtype=torch.uint8, generator=generator)
        return Grouped(codes, powers.view(torch.float8_e8m0fnu), 4, table=table)
    codes = torch.randn(rows, k, generator=generator).to(FLOAT8).view(torch.uint8)
    return Grouped(codes, scale.float()[:, :1].contiguous(), 8, float8=True)


def draw(kind, dtype):
    """Experts of few bits, and the same in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    rest = dict(
        gate_up_bias=torch.randn(E, 2 * F, generator=generator).to(dtype),
        down_bias=torch.randn(E, H, generator=generator).to(dtype),
        clamp=Clamp(alpha=1.702, limit=7.0),
    )
    gate_up, down = stack(kind, E * 2 * F, H), stack(kind, E * H, F)
    wide = Experts(
        gate_up=widen_grouped(gate_up, dtype).view(E, 2 * F, H),
        down=widen_grouped(down, dtype).view(E, H, F),
        **rest,
    )
    return Experts(gate_up=gate_up, down=down, **rest), wide


def rows(num, dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num, H, generator=generator).to(dtype)
    chosen = torch.stack([torch.randperm(E - 1, generator=generator)[:2] for _ in range(num)])
    return x, torch.rand(num, 2, generator=generator), chosen.int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_mix_to_the_bits_of_their_wide_weights(kind, dtype):
    ops, drawn = TorchOps("cpu"), rows(9, dtype)
    packed, wide = draw(kind, dtype)
    assert packed.shape == wide.shape == (E, H, F)
    packed = ops.pack_experts(packed, dtype)
    assert torch.equal(ops.moe(*drawn, packed), ops.moe(*drawn, wide))


def test_only_chosen_experts_are_widened_one_at_a_time():
    seen, ops = [], TorchOps("cpu")

    class Watched(TorchOps):
        def grouped_linear(self, x, weight, bias=None):
            seen.append(weight.shape)
            return super().grouped_linear(x, weight, bias)

    packed, _ = draw("zeros", torch.float32)
    x, weights, chosen = rows(5, torch.float32)
    packed.down.scale[(E - 1) * H :] = torch.nan  # of the expert that nobody chose
    out = Watched("cpu").moe(x, weights, chosen, ops.pack_experts(packed, x.dtype))
    assert torch.isfinite(out).all()
    assert seen == [(2 * F, H), (H, F)] * len(chosen.unique())


@pytest.mark.parametrize("num", [1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_the_native_backend_multiplies_the_codes_of_each_expert(kind, num):
    try:
        ops = NativeOps("cpu")
    except ConfigError as error:
        pytest.skip(str(error))
    drawn = rows(num, torch.bfloat16)
    packed, wide = draw(kind, torch.bfloat16)
    packed = ops.pack_experts(packed, torch.bfloat16)
    assert packed.shape == (E, H, F)
    got, want = ops.moe(*drawn, packed).float(), TorchOps("cpu").moe(*drawn, wide).float()
    assert (got - want).norm() / want.norm() < 0.02
