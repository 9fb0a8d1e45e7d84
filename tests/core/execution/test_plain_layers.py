"""LayerNorm, plain MLPs, learned positions, and matrices that are stored the other way round."""

import pytest
import torch
from torch import nn

from pagedcore.execution.model import ModelBuild
from pagedcore.execution.plain_layers import (
    ACTIVATIONS,
    LayerNorm,
    LearnedPositions,
    PlainMLP,
    TransposedWeights,
    transposed,
)
from pagedcore.execution.quantizer import Unquantized
from pagedcore.execution.torch_ops import TorchOps


class Tensors:
    """`Weights` out of a dictionary; remembers which dimension each tensor is divided along."""

    def __init__(self, **tensors):
        self.tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        self.dims = {}
        self.ignored = []

    def has(self, name):
        return name in self.tensors

    def take(self, name, shape, *, dtype=None, dim=None):
        assert self.tensors[name].shape == tuple(shape)
        self.dims[name] = dim
        return self.tensors[name]

    def ignore(self, prefix):
        self.ignored.append(prefix)


def build_of(weights, dtype=torch.float32):
    return ModelBuild(
        config={},
        weights=weights,
        quantizer=Unquantized(),
        ops=TorchOps("cpu"),
        dtype=dtype,
        device=torch.device("cpu"),
        max_positions=16,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_is_that_of_torch_and_adds_first(dtype):
    torch.manual_seed(0)
    reference = nn.LayerNorm(24, eps=1e-3, dtype=dtype)
    nn.init.normal_(reference.weight)
    nn.init.normal_(reference.bias)
    x, residual = torch.randn(2, 5, 24).to(dtype)
    with torch.inference_mode():
        weights = Tensors(n__weight=reference.weight, n__bias=reference.bias)
        norm = LayerNorm(build_of(weights, dtype), "n", 24, 1e-3)
        assert torch.equal(norm(x), reference(x))
        expected = x + residual
        normed, total = norm.add(x, residual.clone())
        assert torch.equal(total, expected)
        assert torch.equal(normed, reference(expected))


def test_a_layer_norm_may_have_neither_weight_nor_bias():
    norm = LayerNorm(build_of(Tensors()), "n", 8, 1e-5, weight=False, bias=False)
    x = torch.randn(3, 8)
    assert torch.equal(norm(x), nn.functional.layer_norm(x, (8,)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_the_one_that_transformers_has_under_its_name(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 200)
    assert torch.allclose(ACTIVATIONS[name](x), ACT2FN[name](x), atol=1e-6)


def test_learned_positions_begin_behind_the_offset():
    table = torch.arange(12.0).view(6, 2)
    positions = LearnedPositions(build_of(Tensors(p__weight=table)), "p", 4, 2, offset=2)
    assert positions(torch.tensor([0, 3])).tolist() == [[4.0, 5.0], [10.0, 11.0]]


def test_transposed_weights_turn_matrices_and_leave_vectors():
    weights = Tensors(m__weight=torch.arange(6.0).view(2, 3), m__bias=torch.ones(3))
    turned = TransposedWeights(weights)
    matrix = turned.take("m.weight", (3, 2), dim=0)
    assert torch.equal(matrix, weights.tensors["m.weight"].t())
    assert matrix.is_contiguous()
    assert weights.dims["m.weight"] == 1  # the same outputs, stored as columns
    assert turned.take("m.bias", (3,)) is weights.tensors["m.bias"]
    assert turned.has("m.weight")
    assert not turned.has("m")
    turned.ignore("x.")
    assert weights.ignored == ["x."]


def test_transposed_weights_have_a_shape_where_they_have_no_content():
    weights = TransposedWeights(Tensors(m__weight=torch.empty(2, 3, device="meta")))
    matrix = weights.take("m.weight", (3, 2))
    assert matrix.is_meta
    assert matrix.shape == (3, 2)


def test_a_plain_mlp_reads_matrices_stored_either_way():
    torch.manual_seed(0)
    up, down, x = torch.randn(6, 4), torch.randn(4, 6), torch.randn(3, 4)
    biases = {"u__bias": torch.randn(6), "d__bias": torch.randn(4)}
    plain = build_of(Tensors(u__weight=up, d__weight=down, **biases))
    turned = build_of(Tensors(u__weight=up.t(), d__weight=down.t(), **biases))
    outs = [
        PlainMLP(build, ["u", "d"], 4, 6, activation="relu")(x)
        for build in (plain, transposed(turned))
    ]
    expected = nn.functional.linear(x, up, biases["u__bias"]).relu()
    expected = nn.functional.linear(expected, down, biases["d__bias"])
    assert torch.allclose(outs[0], expected)
    assert torch.allclose(outs[1], expected)
