"""Configs and tensors of few bits that contradict each other are refused by name, and unread."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore.errors import ModelError
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.paged_model import PagedModel
from pagedcore.testing.tiny_models import save_tiny_model
from pagedcore.testing.written_blocks import GGUF_KINDS, gguf_matrix
from pagedcore.testing.written_formats import WRITTEN
from pagedcore_models.cases import CASES
from pagedcore_models.gpt_oss import GptOssForCausalLM
from pagedcore_quantization import pagedcore_quantizers

LAYER = "model.layers.0.mlp.down_proj"
NOT_NEEDED = ("weight_shape", "weight_format", "g_idx", "input_scale")


def save_layer(folder, form):
    """One layer [64, 128] in a format; its quantization_config."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    tensors, _ = WRITTEN[form].write(weight)
    (folder / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    save_file({f"{LAYER}.{n}": t for n, t in tensors.items()}, folder / "model.safetensors")
    return json.loads(json.dumps(WRITTEN[form].config))


def look_at(folder, settings):
    """What a start does before it reads: the layer on the device meta."""
    checkpoint = Checkpoint(folder)
    build(checkpoint.shapes(torch.float32), settings)
    checkpoint.check_all_taken()


def build(weights, settings, columns=128):
    quantizer = pagedcore_quantizers()[settings["quant_method"]](settings)
    quantizer.linear(weights, TorchOps("cpu"), [LAYER], columns, [64], bias=False, dim=1)


def scheme(settings):
    return settings["config_groups"]["group_0"]["weights"]


CHANGES = [
    ("awq", {"group_size": 64}, "down_proj.qzeros' must have the shape [2, 8]"),
    ("awq", {"group_size": -1}, "down_proj.qzeros' must have the shape [1, 8]"),
    ("awq", {"bits": 8}, "bits must be 4, not 8"),
    ("awq", {"group_size": 48}, "wants groups of 48"),
    ("awq", {"group_size": 33}, "group_size must be -1, or a multiple of 16, not 33"),
    ("awq", {"bits": 3}, "bits must be 4, not 3"),
    ("awq", {"version": "gemv"}, "version must be gemm, not 'gemv'"),
    ("awq", {"zero_point": False}, "zero_point must be true"),
    ("awq", {"backend": "llm-awq"}, "backend must be one of autoawq"),
    ("gptq 4", {"bits": 8}, "down_proj.qweight' must have the shape [32, 64]"),
    ("gptq 4", {"bits": 2}, "bits must be 4 or 8, not 2"),
    ("gptq 4", {"bits": "4"}, "bits must be a whole number"),
    ("gptq 4", {"group_size": 16}, "down_proj.qzeros' must have the shape [8, 8]"),
    ("gptq 4", {"group_size": 0}, "group_size must be -1, or a multiple of 16"),
    ("gptq 4", {"desc_act": "yes"}, "desc_act must be true or false"),
    ("gptq 4", {"checkpoint_format": "marlin"}, "checkpoint_format must be one of gptq, gptq_v2"),
    ("gptq 4", {"bits": None}, "bits must be a whole number from 1 to 2147483647, not None"),
    ("gptq 8", {"bits": 4}, "down_proj.qweight' must have the shape [16, 64]"),
    ("gptq 8", {"group_size": 64}, "down_proj.qzeros' must have the shape [2, 16]"),
    ("gptq 8 reordered", {"group_size": -1}, "down_proj.qzeros' must have the shape [1, 16]"),
    ("gptq 4 by output", {"group_size": 32}, "down_proj.qzeros' must have the shape [4, 8]"),
    ("gptq 4", {"lm_head": True}, "lm_head must be false"),
    ("gptq 4", {"dynamic": {"-:x": {}}}, "dynamic must be empty"),
    (
        "gptq 4",
        {"quant_method": "awq", "version": "gemm"},
        "down_proj.qweight' must have the shape",
    ),
    ("fp8 blocks", {"weight_block_size": [64, 64]}, "weight_block_size must be [128, 128], not"),
    ("fp8 blocks", {"fmt": "int8"}, "fmt must be one of e4m3"),
    ("fp8 by matrix", {"weight_block_size": [128, 128]}, "down_proj.weight_scale_inv'"),
    ("fp8 by matrix", {"fmt": "e5m2"}, "fmt must be one of e4m3"),
    ("bitsandbytes nf4", {"load_in_4bit": False}, "load_in_4bit must be true where load_in_8bit"),
    ("bitsandbytes nf4", {"load_in_8bit": True}, "load_in_4bit must be true where load_in_8bit"),
    ("bitsandbytes nf4", {"bnb_4bit_quant_type": "int4"}, "must be one of fp4, nf4"),
    ("bitsandbytes nf4", {"bnb_4bit_use_double_quant": True}, "must have a type like torch.uint8"),
    ("bitsandbytes nf4 nested", {"bnb_4bit_use_double_quant": False}, "a type like torch.float32"),
    ("bitsandbytes nf4", {"bnb_4bit_quant_storage": "bfloat16"}, "must be one of uint8"),
    (
        "bitsandbytes int8",
        {"load_in_8bit": False, "load_in_4bit": True},
        "weight' must have the shape",
    ),
]


@pytest.mark.parametrize(("form", "change", "words"), CHANGES)
def test_a_config_that_lies_is_refused_by_name(form, change, words, tmp_path):
    settings = save_layer(tmp_path, form)
    with pytest.raises(ModelError) as error:
        look_at(tmp_path, settings | change)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("compressed 4", {"group_size": 64}, "down_proj.weight_scale' must have the shape [64, 2]"),
        ("compressed 4", {"group_size": 33}, "group_size must be -1, or a multiple of 16, not 33"),
        ("compressed 4", {"group_size": None}, "group_size must be the number of inputs"),
        ("compressed 4", {"num_bits": 8}, "weight_packed' must have the shape [64, 32]"),
        ("compressed 4", {"num_bits": 3}, "num_bits must be 4 or 8, not 3"),
        ("compressed 4", {"symmetric": False}, "lacks tensors"),
        ("compressed 4 with zeros", {"symmetric": True}, "does not use"),
        ("compressed 4", {"actorder": "group"}, "lacks tensors"),
        ("compressed 4", {"actorder": "up"}, "actorder must be one of"),
        ("compressed 4", {"strategy": "block"}, "strategy must be one of tensor, channel, group"),
        ("compressed 8", {"num_bits": 4}, "weight_packed' must have the shape [64, 16]"),
        ("compressed 8", {"strategy": "group", "group_size": 32}, "must have the shape [64, 4]"),
        ("int8 w8a8", {"num_bits": 4}, "num_bits must be 8, not 4"),
        ("int8 w8a8", {"strategy": "group", "group_size": 64}, "must have the shape [64, 2]"),
        ("int8 w8a8", {"symmetric": False}, "lacks tensors"),
        ("int8 weights with zeros", {"symmetric": True}, "does not use"),
        ("fp8 by output", {"num_bits": 4}, "num_bits must be 8, not 4"),
        ("fp8 by output", {"type": "int"}, "weights.type must be one of float, not 'int'"),
        ("fp8 by output", {"strategy": "block"}, "block_structure must be [128, 128], not None"),
        ("int8 weights", {"num_bits": 4}, "num_bits must be 8, not 4"),
        ("int8 weights", {"strategy": "group", "group_size": 32}, "must have the shape [64, 4]"),
    ],
)
def test_a_scheme_that_lies_is_refused_by_name(form, change, words, tmp_path):
    settings = save_layer(tmp_path, form)
    scheme(settings).update(change)
    with pytest.raises(ModelError) as error:
        look_at(tmp_path, settings)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"num_bits": 4, "type": "int"}, "input_activations.num_bits must be 8, not 4"),
        ({"num_bits": 8, "type": "bool"}, "input_activations.type must be one of int, float"),
        ([8], "input_activations must be an object"),
    ],
)
def test_activations_that_are_rounded_otherwise_are_refused(rows, words, tmp_path):
    settings = save_layer(tmp_path, "int8 w8a8")
    settings["config_groups"]["group_0"]["input_activations"] = rows
    with pytest.raises(ModelError) as error:
        look_at(tmp_path, settings)
    assert words in str(error.value)


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_a_type_of_blocks_that_a_layer_does_not_have_is_refused(kind, tmp_path):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    blocks, _ = gguf_matrix(kind, weight)
    (tmp_path / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    save_file({f"{LAYER}.weight": blocks}, tmp_path / "model.safetensors")
    for other in GGUF_KINDS:
        settings = {"quant_method": "gguf", "types": {LAYER: other}}
        weights = Checkpoint(tmp_path).shapes(torch.float32)
        if gguf_matrix(other, weight)[0].shape == blocks.shape:
            build(weights, settings, columns=256)
            continue
        with pytest.raises(ModelError, match=r"down_proj.weight' must have the shape"):
            build(weights, settings, columns=256)


@pytest.fixture
def experts(tmp_path):
    """A checkpoint of GPT-OSS whose experts are codes in MXFP4, and its tensors."""
    save_tiny_model(tmp_path, CASES["GptOssForCausalLM"].config)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.zeros(count, rows, inputs // 32, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((count, rows, inputs // 32), 120, dtype=torch.uint8)
    return tmp_path, tensors


@pytest.mark.parametrize("part", ["blocks", "scales"])
@pytest.mark.parametrize("lie", ["missing", "groups of 64", "16 bits"])
def test_experts_in_mxfp4_that_contradict_their_config_are_refused_by_name(part, lie, experts):
    folder, tensors = experts
    name = f"model.layers.0.mlp.experts.down_proj_{part}"
    tensor = tensors.pop(name)
    if lie != "missing":
        cut = tensor[:, :, ::2].contiguous()
        tensors[name] = cut if lie == "groups of 64" else tensor.half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "mxfp4"}
    with pytest.raises(ModelError) as error:
        PagedModel(folder, GptOssForCausalLM, quantizer=pagedcore_quantizers()["mxfp4"](settings))
    assert name in str(error.value)


@pytest.mark.parametrize("form", WRITTEN)
def test_every_tensor_that_is_missing_is_named(form, tmp_path):
    settings = save_layer(tmp_path, form)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    needed = [n for n in tensors if not n.endswith(NOT_NEEDED)]
    for name in needed:
        if name.endswith("nf4") and "nested" not in form:
            continue  # only doubly quantized scales need it
        save_file({n: t for n, t in tensors.items() if n != name}, path)
        with pytest.raises(ModelError) as error:
            look_at(tmp_path, settings)
        assert name in str(error.value)


@pytest.mark.parametrize("form", ["gptq 4 reordered", "compressed 4 reordered"])
def test_inputs_without_an_even_order_are_refused(form, tmp_path):
    settings = save_layer(tmp_path, form)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("g_idx"))
    for value in (-1, 1, 4, 2**31 - 1):
        tensors[name][tensors[name] == 0] = value
        save_file(tensors, path)
        weights = Checkpoint(tmp_path).tensors(torch.float32, torch.device("cpu"))
        with pytest.raises(ModelError, match="g_idx' must put 32 inputs into each of 4 groups"):
            build(weights, settings)


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b'{"blocksize": 64}', b'{"blocksize": 32, "shape": [64, 128]}']
)
def test_a_state_that_lies_is_refused(text, tmp_path):
    settings = save_layer(tmp_path, "bitsandbytes nf4")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
    tensors[name] = torch.tensor(list(text)).byte()
    save_file(tensors, path)
    weights = Checkpoint(tmp_path).tensors(torch.float32, torch.device("cpu"))
    with pytest.raises(ModelError, match="bitsandbytes__nf4"):
        build(weights, settings)


@pytest.mark.parametrize("name", ["awq", "gptq", "bitsandbytes", "gguf", "compressed-tensors"])
def test_a_checkpoint_of_16_bits_is_no_packed_one(name):
    with pytest.raises(ModelError, match="the checkpoint is not quantized by its"):
        pagedcore_quantizers()[name]({})


def test_layers_that_were_left_alone_are_taken_as_they_are(tmp_path):
    settings = save_layer(tmp_path, "awq") | {"modules_to_not_convert": ["down_proj"]}
    with pytest.raises(ModelError, match=r"down_proj\.weight'"):
        look_at(tmp_path, settings)
    save_file({f"{LAYER}.weight": torch.ones(64, 128)}, tmp_path / "model.safetensors")
    look_at(tmp_path, settings)
