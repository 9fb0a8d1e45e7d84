"""A checkpoint gives the tensors that it holds, and says what is missing, wrong or left over."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pagedcore.errors import ModelError
from pagedcore.execution import weight_reader
from pagedcore.execution.checkpoint import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path):
    """Save tensors, and fields of config.json, as a folder; and open it."""

    def save(tensors, **config):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path)

    return save


def test_a_tensor_arrives_as_it_was_saved(checkpoint):
    saved = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    weights = checkpoint(saved).tensors(torch.float32, CPU)
    for name in ("b", "a", "a"):  # in any order, and again
        tensor = weights.take(name, saved[name].shape)
        assert torch.equal(tensor, saved[name])
        assert tensor.is_contiguous()
    weights.finish()


def test_what_is_taken_belongs_to_the_taker(checkpoint):
    weights = checkpoint({"a": torch.ones(4)}).tensors(torch.float32, CPU)
    weights.take("a", (4,)).zero_()
    assert torch.equal(weights.take("a", (4,)), torch.ones(4))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32])
def test_float_types_become_the_models(checkpoint, stored, wanted):
    saved = torch.randn(16).to(stored)
    weights = checkpoint({"a": saved}).tensors(wanted, CPU)
    assert torch.equal(weights.take("a", (16,)), saved.to(wanted))
    assert torch.equal(weights.take("a", (16,), dtype=torch.float32), saved.float())


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_other_types_stay_what_they_are(checkpoint, dtype):
    saved = torch.arange(8).to(dtype)
    weights = checkpoint({"a": saved}).tensors(torch.bfloat16, CPU)
    taken = weights.take("a", (8,), dtype=dtype)
    assert taken.dtype == dtype
    assert torch.equal(taken.view(torch.uint8), saved.view(torch.uint8))
    with pytest.raises(ModelError, match="quantization_config"):
        weights.take("a", (8,))


def test_tensors_of_one_number_and_of_none_are_read(checkpoint):
    weights = checkpoint({"one": torch.tensor(3.0), "none": torch.zeros(0, 4)}).tensors(
        torch.float32, CPU
    )
    assert weights.take("one", ()) == 3
    assert weights.take("none", (0, 4)).shape == (0, 4)


def test_a_tensor_larger_than_a_piece_is_read_by_several_threads(checkpoint, monkeypatch):
    monkeypatch.setattr(weight_reader, "PIECE_BYTES", 1000)
    saved = torch.randn(101, 37)
    assert torch.equal(
        checkpoint({"a": saved}).tensors(torch.float32, CPU).take("a", (101, 37)), saved
    )


@pytest.mark.parametrize("kind", ["shapes", "tensors"])
def test_another_shape_is_named_with_what_was_found(checkpoint, kind):
    opened = checkpoint({"a": torch.zeros(3, 5)})
    weights = (
        opened.shapes(torch.float32) if kind == "shapes" else opened.tensors(torch.float32, CPU)
    )
    for shape in ((5, 3), (15,), (3, 5, 1)):
        with pytest.raises(ModelError) as error:
            weights.take("a", shape)
        assert f"'a' must have the shape {list(shape)}" in str(error.value)
        assert "model.safetensors holds [3, 5]" in str(error.value)


def test_a_missing_tensor_is_named(checkpoint):
    weights = checkpoint({"a": torch.zeros(3)}).tensors(torch.float32, CPU)
    assert weights.has("a")
    assert not weights.has("b")
    with pytest.raises(ModelError, match=r"lacks tensors that its config\.json asks for: 'b'"):
        weights.take("b", (3,))


def test_shapes_allocate_nothing(checkpoint):
    shapes = checkpoint({"a": torch.zeros(3)}).shapes(torch.bfloat16)
    assert shapes.take("a", (3,)).device.type == "meta"
    assert shapes.take("a", (3,)).dtype == torch.bfloat16


def test_missing_tensors_are_listed_together(checkpoint):
    opened = checkpoint({"a": torch.zeros(3)})
    shapes = opened.shapes(torch.float32)
    for name in ("a", "b", "c"):
        shapes.take(name, (3,))
    with pytest.raises(ModelError, match="asks for: 'b', 'c'"):
        opened.check_all_taken()


def test_a_config_with_a_billion_layers_is_found_out_at_once(checkpoint):
    shapes = checkpoint({"a": torch.zeros(3)}).shapes(torch.float32)
    asked = (shapes.take(f"layers.{i}", (3,)) for i in range(10**9))
    with pytest.raises(ModelError, match=r"'layers\.7'"):
        any(tensor is None for tensor in asked)


def test_tensors_that_nobody_took_are_listed(checkpoint):
    opened = checkpoint({f"layers.{i}": torch.zeros(1) for i in range(20)})
    opened.shapes(torch.float32).take("layers.0", (1,))
    with pytest.raises(ModelError, match=r"has 19 tensors .*'layers.1'.* and 11 more"):
        opened.check_all_taken()


def test_tensors_that_are_known_and_not_needed_are_no_leftovers(checkpoint):
    opened = checkpoint({"a": torch.zeros(1), "vision.b": torch.zeros(1)})
    shapes = opened.shapes(torch.float32)
    shapes.take("a", (1,))
    shapes.ignore("vision.")
    opened.check_all_taken()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(checkpoint, bad):
    """IN-45: found when all is read, without a wait per tensor."""
    weights = checkpoint(
        {"good": torch.full((9,), 6e4), "bad": torch.tensor([1.0, bad, 1.0])}
    ).tensors(torch.float16, CPU)
    weights.take("good", (9,))
    weights.take("bad", (3,))
    with pytest.raises(ModelError, match="1 tensors that hold NaN or infinity: 'bad'"):
        weights.finish()


def test_a_file_that_shrinks_meanwhile_is_an_error(checkpoint):
    opened = checkpoint({"a": torch.zeros(1000)})
    weights = opened.tensors(torch.float32, CPU)
    assert weights.has("a")
    with (opened.folder / "model.safetensors").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(ModelError, match="became shorter"):
        weights.take("a", (1000,))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "torch.float32"}, torch.float32),
        ({"dtype": "float16", "torch_dtype": "float32"}, torch.float16),
        ({"dtype": None}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_the_type_is_what_the_config_says_or_else_what_most_is_stored_in(
    checkpoint, config, expected
):
    tensors = {
        "a": torch.zeros(9, dtype=torch.bfloat16),
        "b": torch.zeros(2),
        "c": torch.zeros(99, dtype=torch.int8),
    }
    assert checkpoint(tensors, **config).dtype == expected


@pytest.mark.parametrize("name", ["int8", "float99", 16, ["float16"]])
def test_a_type_that_is_none_is_refused(checkpoint, name):
    with pytest.raises(ModelError, match=r"config\.json: dtype must be one of float16, bfloat16"):
        _ = checkpoint({"a": torch.zeros(1)}, dtype=name).dtype


def test_a_checkpoint_knows_its_size(checkpoint):
    assert checkpoint({"a": torch.zeros(10), "b": torch.zeros(3, dtype=torch.int8)}).num_bytes == 43
