"""Checkpoints of 8 bits run as what they stand for, and broken ones are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore.errors import ModelError

FORMS = [
    "one scale",
    "one scale in a list",
    "blocks",
    "compressed, tensor",
    "compressed, channel",
    "compressed, block",
    "fbgemm",
]
ODD_SIZES = {"hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 2}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_in_8_bits_gives_the_tokens_it_stands_for(form, stored, tokens):
    folder, widened = stored(form, **ODD_SIZES)
    assert tokens(folder) == tokens(widened)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("form", ["one scale", "blocks"])
def test_every_family_reads_8_bits(family, form, stored, tokens):
    folder, widened = stored(form, family, num_hidden_layers=2)
    assert tokens(folder) == tokens(widened)


@pytest.mark.parametrize(
    ("form", "field", "entries"),
    [
        ("one scale", "modules_to_not_convert", ["lm_head", "model.layers.1"]),
        ("one scale", "ignored_layers", [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up")]),
        ("compressed, channel", "ignore", ["lm_head", "re:.*self_attn.*"]),
        ("blocks", "modules_to_not_convert", ["mlp"]),
    ],
)
def test_layers_that_were_left_alone_are_read_as_they_are(form, field, entries, stored, tokens):
    words = {"model.layers.1": "layers.1.", "mlp": "mlp", "re:.*self_attn.*": "self_attn"}
    marks = [words.get(entry, entry + ".") for entry in entries if entry != "lm_head"]

    def kept(name):
        return any(mark in name for mark in marks)

    folder, widened = stored(form, kept=kept, settings={field: entries})
    assert tokens(folder) == tokens(widened)


def test_random_weights_stand_in_for_8_bits(stored, tokens):
    folder, _ = stored("compressed, channel")
    (folder / "model.safetensors").unlink()
    assert [len(t) for t in tokens(folder, load_format="dummy")] == [12, 12, 12]


def change(folder, **settings):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config), encoding="utf-8")


def group(**weights):
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"} | weights
    return {"config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    ("form", "settings", "words"),
    [
        ("blocks", {"weight_block_size": [64, 128]}, "weight_block_size must be [128, 128], not"),
        ("blocks", {"weight_block_size": "128"}, "weight_block_size must be [128, 128], not"),
        ("blocks", {"weight_block_size": None}, "weight_scale_inv' must have the shape [160, 1]"),
        ("one scale", {"weight_block_size": [128, 128]}, "q_proj.weight_scale_inv'"),
        ("one scale", {"fmt": "e5m2"}, "quantization_config.fmt must be one of e4m3"),
        ("one scale", {"activation_scheme": "some"}, "activation_scheme must be one of dynamic"),
        ("one scale", {"modules_to_not_convert": "lm_head"}, "must be a list of layers"),
        ("one scale", {"modules_to_not_convert": [3]}, "must hold names"),
        ("one scale", {"modules_to_not_convert": ["q_proj"]}, "multiplied as one matrix"),
        ("one scale", {"modules_to_not_convert": ["mlp"]}, "must have a type like torch.float32"),
        ("fbgemm", {"modules_to_not_convert": ["re:(a+)+"]}, "none of the simple ones"),
        ("fbgemm", {"modules_to_not_convert": ["re:["]}, "none of the simple ones"),
        ("compressed, channel", {"format": "pack-quantized"}, "weights.type must be one of int"),
        ("compressed, channel", {"format": "marlin-24"}, "format must be one of float-"),
        ("compressed, channel", {"config_groups": {}}, "config_groups must hold a group"),
        ("compressed, channel", {"config_groups": {"a": 1}}, "config_groups.a must be an object"),
        ("compressed, channel", group(num_bits=4), "weights.num_bits must be 8, not 4"),
        ("compressed, channel", group(type="int"), "weights.type must be one of float, not 'int'"),
        ("compressed, channel", group(symmetric=False), "weights.symmetric must be true"),
        ("compressed, channel", group(dynamic=True), "weights.dynamic must be false"),
        ("compressed, channel", group(strategy="group"), "strategy must be one of tensor, channel"),
        ("compressed, channel", {"sparsity_config": {"format": "2:4"}}, "sparsity_config.format"),
        ("compressed, channel", {"quant_method": "quip"}, "no quantizer is named 'quip'"),
    ],
)
@pytest.mark.timeout(20)
def test_a_format_that_is_not_understood_is_refused_by_name(form, settings, words, stored, tokens):
    folder, _ = stored(form, **ODD_SIZES)
    change(folder, **settings)
    with pytest.raises((ModelError, LookupError)) as error:
        tokens(folder)
    assert words in str(error.value)


def test_groups_that_contradict_each_other_are_refused(stored, tokens):
    folder, _ = stored("compressed, channel")
    block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    change(
        folder,
        config_groups=group()["config_groups"] | {"b": {"targets": ["Linear"], "weights": block}},
    )
    with pytest.raises(ModelError, match="in one group only"):
        tokens(folder)
    change(folder, config_groups={"a": {"targets": "re:.*mlp", "weights": block}})
    with pytest.raises(ModelError, match="targets must be"):
        tokens(folder)


def test_a_checkpoint_of_8_bits_that_does_not_say_so_is_refused(stored, tokens):
    folder, _ = stored("one scale")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["quantization_config"]
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="must have a type like"):
        tokens(folder)


def test_another_format_than_the_checkpoints_own_is_refused(stored, tokens):
    folder, _ = stored("compressed, channel")
    with pytest.raises(ModelError, match="Leave out --quantization"):
        tokens(folder, quantization="fp8")


def test_a_scale_of_another_shape_is_named(stored, tokens):
    folder, _ = stored("compressed, channel")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = torch.ones(3, 1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"down_proj.weight_scale' must have the shape \[64, 1\]"):
        tokens(folder)


def test_a_scale_that_is_not_a_number_is_refused(stored, tokens):
    folder, _ = stored("compressed, channel")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"][2] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"down_proj.weight_scale"):
        tokens(folder)
