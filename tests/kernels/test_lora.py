"""Adapters in kernels equal those in plain torch, whoever has which."""

import pytest
import torch

from pagedcore.execution.lora_ops import NO_ADAPTER, AdapterStep, LoraWeights
from pagedcore.execution.torch_ops import TorchOps


def drawn(generator, *shape, dtype, device):
    return torch.randn(shape, generator=generator).div_(4).to(dtype).to(device)


def make(slots, num_single, *, inputs, widths, rank, num_slots, dtype, device, seed=0):
    """y, x, adapters and the step."""
    generator = torch.Generator().manual_seed(seed)
    size = dict(dtype=dtype, device=device)
    num_tokens = len(slots)
    x = drawn(generator, num_tokens, inputs, **size)
    y = drawn(generator, num_tokens, sum(widths), **size)
    weights = LoraWeights(
        a=drawn(generator, num_slots, len(widths) * rank, inputs, **size),
        b=drawn(generator, num_slots, sum(widths), rank, **size),
        widths=tuple(widths),
        part_widths=torch.tensor(widths, dtype=torch.int32, device=device),
        present=torch.ones(num_slots, len(widths), dtype=torch.int32, device=device),
    )
    return y, x, weights, AdapterStep(torch.tensor(slots, dtype=torch.int32).to(device), num_single)


def check(device, slots, num_single, **shape):
    from pagedcore_kernels.backend import TritonOps

    y, x, weights, step = make(slots, num_single, device=device, **shape)
    expected, untouched = y.clone(), y.clone()
    TorchOps(device).add_lora(expected, x, weights, step)
    ops = TritonOps(device)
    ops.add_lora(y, x, weights, step)
    assert not ops.replaced
    tolerance = 1e-4 if y.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    without = torch.tensor(slots) == NO_ADAPTER
    assert torch.equal(y[without], untouched[without])
    return y


SHAPE = dict(inputs=96, widths=(40, 24), rank=16, num_slots=4, dtype=torch.float32)


@pytest.mark.parametrize(
    ("slots", "num_single"),
    [
        ([2], 1),
        ([NO_ADAPTER], 1),
        ([0, 1, 2, 3, NO_ADAPTER, 1, 1], 7),
        ([3] * 5, 0),
        ([1, NO_ADAPTER, 3, *[2] * 20, *[0] * 50, *[NO_ADAPTER] * 9, *[2] * 3], 3),
    ],
)
def test_each_token_gets_its_own_adapter(device, slots, num_single):  # LORA-1
    check(device, slots, num_single, **SHAPE)


@pytest.mark.parametrize(
    "changed",
    [
        {"rank": 48},
        {"rank": 64, "dtype": torch.float16},
        {"inputs": 51, "widths": (7,)},
        {"inputs": 2100, "widths": (130, 16, 16)},
        {"dtype": torch.float16, "widths": (129, 300)},
    ],
)
def test_shapes_may_be_odd(device, changed):
    check(device, [0, 3, NO_ADAPTER, 1, 1, 1, 2], 3, **SHAPE | changed)


def test_rows_may_lie_apart(device):
    from pagedcore_kernels.backend import TritonOps

    y, x, weights, step = make([0, 2, 2, 1], 2, device=device, **SHAPE)
    apart_x, apart_y = (torch.cat([t, t], 1)[:, : t.shape[1]] for t in (x, y))
    ops = TritonOps(device)
    ops.add_lora(y, x, weights, step)
    ops.add_lora(apart_y, apart_x, weights, step)
    assert torch.equal(y, apart_y)


def test_parts_that_an_adapter_leaves_alone_are_not_read(device):
    from pagedcore_kernels.backend import TritonOps

    y, x, weights, step = make([1, 2, 1, 1], 1, device=device, **SHAPE)
    before = y.clone()
    weights.present[1, 0] = 0
    weights.a[1, :16] = torch.nan
    TritonOps(device).add_lora(y, x, weights, step)
    changed = [(row != old).any() for row, old in zip(y, before, strict=True)]
    assert all(changed)
    assert torch.equal(y[[0, 2, 3], :40], before[[0, 2, 3], :40])
    assert bool(y.isfinite().all())
