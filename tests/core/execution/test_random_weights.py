"""Random weights are never zeros, and the same in every run."""

import json

import pytest
import torch

from pagedcore.execution.random_weights import DEVIATION, RandomCheckpoint, RandomWeights

CPU = torch.device("cpu")


def test_weights_are_normal_around_zero_and_those_of_norms_around_one():
    weights = RandomWeights(torch.float32, CPU, seed=0)
    matrix = weights.take("layers.0.q_proj.weight", (500, 200), dim=0)
    norm = weights.take("layers.0.input_layernorm.weight", (10_000,))
    for tensor, mean in ((matrix, 0.0), (norm, 1.0)):
        assert tensor.mean() == pytest.approx(mean, abs=1e-3)
        assert tensor.std() == pytest.approx(DEVIATION, rel=0.05)


def test_a_tensor_depends_on_its_name_and_the_seed_alone():
    first = RandomWeights(torch.float32, CPU, seed=0)
    second = RandomWeights(torch.float32, CPU, seed=0)
    a, b = first.take("a", (8,)), first.take("b", (8,))
    assert torch.equal(second.take("b", (8,)), b)
    assert torch.equal(second.take("a", (8,)), a)
    assert not torch.equal(a, b)
    assert not torch.equal(RandomWeights(torch.float32, CPU, seed=1).take("a", (8,)), a)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8]
)
def test_every_type_is_filled(dtype):
    tensor = RandomWeights(torch.float32, CPU, seed=0).take("a", (4, 64), dtype=dtype)
    assert tensor.dtype == dtype
    assert tensor.double().std() > 0
    assert tensor.double().isfinite().all()


def test_on_meta_nothing_is_drawn_and_bytes_are_counted(tmp_path):
    config = {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    checkpoint = RandomCheckpoint(tmp_path, seed=0)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.shapes(checkpoint.dtype).take("a", (10**6, 10**6)).is_meta
    checkpoint.check_all_taken()
    assert checkpoint.num_bytes == 2 * 10**12
    weights = checkpoint.tensors(torch.float32, CPU)
    assert weights.take("a", (3,)).dtype == torch.float32
    weights.finish()


def test_a_config_that_tells_no_type_means_float32(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert RandomCheckpoint(tmp_path, seed=0).dtype == torch.float32


def test_exponents_let_float4_be_about_as_large_as_other_numbers():
    weights = RandomWeights(torch.float32, torch.device("cpu"), 0)
    scales = weights.take("x.down_proj_scales", (500,), dtype=torch.uint8)
    assert set(scales.tolist()) == {119, 120, 121}
    assert weights.take("x.down_proj_blocks", (500,), dtype=torch.uint8).max() > 200
