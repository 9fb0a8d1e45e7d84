"""Checkpoints of few bits, from our own writer: read to the bit, and run as what they stand for."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.tiny_models import save_tiny_model
from pagedcore.testing.written_formats import WRITTEN
from pagedcore_quantization import pagedcore_quantizers

OPS = TorchOps("cpu")
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
EXACT = [name for name in WRITTEN if name != "int8 w8a8"]


def quantizer_of(config):
    return pagedcore_quantizers()[config["quant_method"]](config)


def write_layers(folder, form, shapes):
    """A checkpoint of a few layers; the matrices that were stored, and what they stand for."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    tensors, original, stood_for = {}, [], []
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator)
        written, meant = WRITTEN[form].write(weight)
        tensors |= {f"{name}.{what}": tensor for what, tensor in written.items()}
        original.append(weight)
        stood_for.append(meant)
    save_file(tensors, folder / "model.safetensors")
    return torch.cat(original), torch.cat(stood_for)


def load_layer(folder, form, shapes, device="cpu"):
    checkpoint = Checkpoint(folder)
    weights = (
        checkpoint.shapes(torch.float32)
        if device == "meta"
        else checkpoint.tensors(torch.float32, torch.device("cpu"))
    )
    columns = next(iter(shapes.values()))[1]
    rows = [shape[0] for shape in shapes.values()]
    quantizer = quantizer_of(WRITTEN[form].config)
    method = quantizer.linear(weights, OPS, list(shapes), columns, rows, bias=False, dim=0)
    if device == "meta":
        checkpoint.check_all_taken()
    return method


@pytest.mark.parametrize("form", EXACT)
def test_a_layer_is_to_the_bit_what_its_format_defines(form, tmp_path):
    shapes = {"a.q_proj": (64, 128), "a.k_proj": (32, 128)}
    _, meant = write_layers(tmp_path, form, shapes)
    method = load_layer(tmp_path, form, shapes)
    assert torch.equal(method.apply(torch.eye(128)).t(), meant)


@pytest.mark.parametrize("form", WRITTEN)
def test_a_layer_is_as_near_to_the_original_as_its_format_promises(form, tmp_path):
    shapes = {"a.down_proj": (64, 256)}
    weight, _ = write_layers(tmp_path, form, shapes)
    error = (load_layer(tmp_path, form, shapes).apply(torch.eye(256)).t() - weight).abs()
    assert 0 < error.max() <= WRITTEN[form].error * weight.abs().max()


@pytest.mark.parametrize("form", WRITTEN)
def test_every_tensor_of_a_format_is_known_before_any_is_read(form, tmp_path):
    shapes = {"a.gate_proj": (64, 128), "a.up_proj": (64, 128)}
    write_layers(tmp_path, form, shapes)
    load_layer(tmp_path, form, shapes, device="meta")


def test_activations_of_8_bits_lose_no_more_than_a_half_step(tmp_path):
    shapes = {"a.down_proj": (64, 256)}
    _, meant = write_layers(tmp_path, "int8 w8a8", shapes)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(3))
    half_step = x.abs().amax(1, keepdim=True) / 254
    bound = half_step * meant.abs().sum(1)
    error = (load_layer(tmp_path, "int8 w8a8", shapes).apply(x) - x @ meant.t()).abs()
    assert (error <= bound * 1.001).all()
    assert error.max() > 0


def save_written(folder, form, family="llama", **fields):
    """A tiny model in a format, and one beside it that holds what it stands for."""
    plain = folder / "plain"
    save_tiny_model(plain, family, **SIZES | fields)
    form = WRITTEN[form]
    return (
        plain,
        rewritten(plain, folder / "stored", form),
        rewritten(plain, folder / "wide", None, form),
    )


def rewritten(plain, target, form, meant=None):
    from safetensors.torch import load_file

    target.mkdir()
    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
        elif form is None:
            tensors[name] = meant.write(tensor)[1].contiguous()
        else:
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.{what}": value for what, value in form.write(tensor)[0].items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    if form is not None:
        config["quantization_config"] = dict(form.config)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((plain / name).read_bytes())
    return target


@pytest.mark.parametrize("form", EXACT)
def test_a_model_of_few_bits_gives_the_tokens_it_stands_for(form, tmp_path, tokens):
    _, stored, wide = save_written(tmp_path, form)
    assert tokens(stored) == tokens(wide)


def test_a_model_of_8_bits_on_both_sides_runs(tmp_path, tokens):
    _, stored, _ = save_written(tmp_path, "int8 w8a8")
    assert [len(t) for t in tokens(stored)] == [12, 12, 12]


@pytest.mark.parametrize("form", ["awq", "gptq 4 reordered", "compressed 4", "bitsandbytes nf4"])
def test_experts_stay_packed_unless_reordered_and_then_one_line_says_so(
    form, tmp_path, tokens, caplog
):
    _, stored, wide = save_written(tmp_path, form, "qwen3_moe", moe_intermediate_size=64)
    found = tokens(stored)
    said = sum("experts are widened" in line for line in caplog.messages)
    assert said == ("reordered" in form)
    assert found == tokens(wide)
