"""Adapters (LoRA) as PEFT saves them: what is read, and all that is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore.errors import ModelError
from pagedcore.execution.adapter_files import read_adapter
from pagedcore.testing.drawn_adapters import save_drawn_adapter

SHAPES = {"layers.0.q_proj": (12, 20), "layers.0.up_proj": (12, 32)}
NAME = "base_model.model.layers.0.q_proj.lora_{}.weight"


def read(folder, **options):
    options = {"max_rank": 8, "dtype": torch.float32, "lock_pages": False, **options}
    return read_adapter(folder, options.pop("shapes", SHAPES), **options)


def set_field(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path):
    save_drawn_adapter(tmp_path, SHAPES, rank=4, alpha=6)
    return tmp_path


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_matrices_make_what_the_adapter_adds(tmp_path, use_rslora):
    options = dict(rank=4, alpha=6, use_rslora=use_rslora, dtype=torch.bfloat16)
    changes = save_drawn_adapter(tmp_path, SHAPES, **options)
    adapter = read(tmp_path)
    assert adapter.rank == 4
    assert adapter.matrices.keys() == changes.keys()
    for name, change in changes.items():
        own = adapter.matrices[name]
        torch.testing.assert_close(own.b @ own.a, change)


def test_the_key_is_the_contents_and_nothing_elses(folder, tmp_path):
    again = tmp_path / "again"
    save_drawn_adapter(again, SHAPES, rank=4, alpha=6)
    key = read(folder).key
    assert read(again).key == key
    assert read(again, dtype=torch.float16).key != key
    set_field(again, lora_alpha=7)
    assert read(again).key != key
    other = tmp_path / "other"
    save_drawn_adapter(other, SHAPES, rank=4, alpha=6, seed=1)
    assert read(other).key != key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is not supported"),
        ({"r": 9}, r"rank 9, and at most 8 .*--max-lora-rank"),
        ({"r": 0}, "r must be a positive integer"),
        ({"r": True}, "r must be a positive integer"),
        ({"r": None}, "r must be a positive integer"),
        ({"r": 3}, r"must have the shape \[3, 12\], and has \[4, 12\]"),
        ({"lora_alpha": math.inf}, "adapter_config.json"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
    ],
)
def test_a_field_that_cannot_be_is_named(folder, fields, message):
    set_field(folder, **fields)
    with pytest.raises(ModelError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME.format("B")), "only one of A and B of 'layers.0.q_proj'"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "lm_head"),
        (lambda t: t.update({NAME.format("C"): torch.ones(2)}), "lora_C"),
        (lambda t: t.update({NAME.format("A"): torch.ones(4, 13)}), "for another model"),
        (lambda t: t.update({NAME.format("A"): torch.ones(4, 12).int()}), "must be floats"),
        (lambda t: t.update({NAME.format("A"): torch.full((4, 12), torch.nan)}), "NaN"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ModelError, match=message):
        read(folder)


def test_an_adapter_of_another_architecture_is_refused(folder):
    with pytest.raises(ModelError, match="4 tensors that belong to no linear layer"):
        read(folder, shapes={"h.0.attn": (12, 20)})


def test_numbers_beyond_the_models_type_are_refused(folder):
    change_tensors(folder, lambda t: t.update({NAME.format("A"): torch.full((4, 12), 1e6)}))
    with pytest.raises(ModelError, match=r"beyond torch\.float16"):
        read(folder, dtype=torch.float16)


def test_a_pickle_is_not_read(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin is a pickle"):
        read(folder)


@pytest.mark.parametrize("content", ["", "[]", "[" * 5000, "{", '{"r": ' + "1" * (1 << 20) + "}"])
def test_a_configuration_that_is_none_is_refused(folder, content):
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        read(folder)


def test_a_folder_without_an_adapter_says_what_one_has(tmp_path):
    with pytest.raises(ModelError, match=r"adapter_config\.json and adapter_model\.safetensors"):
        read(tmp_path)
