"""Tiny models whose matrices are stored in 8 bits, and the same models widened again."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore import LLM, SamplingParams
from pagedcore.testing.tiny_models import save_tiny_model

FLOAT8 = torch.float8_e4m3fn
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
}


def scheme(**weights):
    """A quantization_config of compressed-tensors."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False} | weights
    activations = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return COMPRESSED | {"config_groups": {"group_0": group}}


FORMATS = {
    "one scale": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "one scale in a list": {"quant_method": "fp8", "activation_scheme": "static"},
    "blocks": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "compressed, tensor": scheme(strategy="tensor"),
    "compressed, channel": scheme(strategy="channel"),
    "compressed, block": scheme(strategy="block", block_structure=[128, 128]),
    "fbgemm": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
}


def split(weight, form):
    """A matrix as numbers of 8 bits, its scale as the format stores it, and what they stand for."""
    rows, columns = weight.shape
    if "block" in form:
        tall, wide = math.ceil(rows / 128), math.ceil(columns / 128)
        scale = torch.empty(tall, wide)
        for i in range(tall):
            for j in range(wide):
                piece = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                scale[i, j] = piece.abs().max() / 448
        each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    elif form in ("compressed, channel", "fbgemm"):
        scale = weight.abs().amax(1, keepdim=True) / 448
        each = scale
    else:
        scale = weight.abs().max() / 448
        each = scale
        if form != "one scale":
            scale = scale[None]
    values = (weight / each).clamp(-448, 448).to(FLOAT8)
    return values, scale, values.float() * each


def is_matrix(name):
    return name.endswith("_proj.weight")


def rewrite(folder, target, change, **config):
    """Copy a model folder with other tensors and further fields of config.json."""
    target.mkdir()
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8")) | config
    (target / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.fixture
def stored(tmp_path):
    """Make a model in a format: a folder in 8 bits, and one that holds what they stand for."""

    def make(form, family="llama", kept=lambda name: False, settings=None, **fields):
        plain = tmp_path / "plain"
        save_tiny_model(plain, family, **fields)

        def narrow(tensors):
            made = {}
            for name, tensor in tensors.items():
                if not is_matrix(name) or kept(name):
                    made[name] = tensor
                    continue
                values, scale, _ = split(tensor, form)
                suffix = "weight_scale_inv" if form == "blocks" else "weight_scale"
                made[name] = values
                made[name.removesuffix("weight") + suffix] = scale.clone()
                if form == "one scale in a list":
                    made[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
            return made

        def widen(tensors):
            return {
                name: split(tensor, form)[2] if is_matrix(name) and not kept(name) else tensor
                for name, tensor in tensors.items()
            }

        config = FORMATS[form] | (settings or {})
        return (
            rewrite(plain, tmp_path / "stored", narrow, quantization_config=config),
            rewrite(plain, tmp_path / "widened", widen),
        )

    return make


@pytest.fixture(scope="session")
def tokens():
    """The greedy tokens after a few prompts, by the whole engine."""
    prompts = [[1, 2, 3, 4, 5], [7], list(range(40, 80))]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def tokens(folder, **options):
        settings = {"dtype": "float32", "num_gpu_blocks_override": 60, "device": "cpu"} | options
        outputs = LLM(str(folder), **settings).generate(prompts, greedy, progress=False)
        return [output.outputs[0].token_ids for output in outputs]

    return tokens
