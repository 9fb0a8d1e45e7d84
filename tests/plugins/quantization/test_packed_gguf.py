"""Blocks of GGUF files that are kept: to the bit what they are widened to otherwise."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore.errors import ModelError
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.sources.gguf_quants import BLOCK_TYPES
from pagedcore.testing.tiny_models import save_tiny_model
from pagedcore_quantization import pagedcore_quantizers

TYPES = {kind.name: kind for kind in BLOCK_TYPES.values() if kind.block_size > 1}
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where a block's float16 numbers are; at its begin where nothing else is said."""


def blocks(name, rows, columns, seed=0):
    """Random blocks of a type whose scales are ordinary numbers: [rows, bytes of a row]."""
    kind = TYPES[name]
    random = np.random.default_rng(seed)
    stored = random.integers(
        0, 256, (rows * columns // kind.block_size, kind.block_bytes), np.uint8
    )
    for at in HALVES.get(name, (0,)):
        scale = random.normal(0, 0.01, len(stored)).astype(np.float16)
        stored[:, at : at + 2] = scale[:, None].view(np.uint8)
    return stored.reshape(rows, -1)


@pytest.mark.parametrize("name", TYPES)
def test_a_block_is_to_the_bit_what_ggml_defines(name, tmp_path):
    parts = {f"a.{part}_proj": blocks(name, 8, 512, seed) for seed, part in enumerate("qk")}
    (tmp_path / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    tensors = {f"{layer}.weight": torch.from_numpy(part) for layer, part in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = Checkpoint(tmp_path).tensors(torch.float32, torch.device("cpu"))
    settings = {"quant_method": "gguf", "types": dict.fromkeys(parts, name)}
    quantizer = pagedcore_quantizers()["gguf"](settings)
    ops = TorchOps("cpu")
    method = quantizer.linear(weights, ops, list(parts), 512, [8, 8], bias=False, dim=0)
    wide = np.concatenate([TYPES[name].dequantize(part) for part in parts.values()])
    assert torch.equal(method.apply(torch.eye(512)).t(), torch.from_numpy(wide))


def _is_part(name, part):
    return f".{part}_proj" in name or name == f"{part}.weight"


def packed_model(folder, types):
    """A tiny model with layers in the types of some parts, and the same widened."""
    plain, packed, wide = (folder / name for name in ("plain", "packed", "wide"))
    save_tiny_model(plain, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    stored = load_file(plain / "model.safetensors")
    narrow, widened, found = dict(stored), dict(stored), {}
    for seed, (name, tensor) in enumerate(stored.items()):
        kind = next((types[part] for part in types if _is_part(name, part)), None)
        if kind is not None:
            part = blocks(kind, *tensor.shape, seed)
            narrow[name] = torch.from_numpy(part)
            widened[name] = torch.from_numpy(TYPES[kind].dequantize(part))
            found[name.removesuffix(".weight")] = kind
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    for target, tensors in ((packed, narrow), (wide, widened)):
        target.mkdir()
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (target / name).write_bytes((plain / name).read_bytes())
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
        config["quantization_config"] = None
    change = {"quantization_config": {"quant_method": "gguf", "types": found}}
    (packed / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    return packed, wide


@pytest.mark.parametrize(
    "types",
    [
        dict.fromkeys(["q", "k", "v", "o", "gate", "up", "down"], "Q4_K"),
        {"q": "Q4_K", "k": "Q4_K", "v": "Q6_K", "gate": "Q5_K", "up": "Q5_K", "down": "Q8_0"},
        {"q": "Q4_0", "gate": "Q4_1", "up": "Q4_1"},
        {"q": "Q4_0", "lm_head": "Q6_K"},
    ],
    ids=["alike", "mixed", "some", "head"],
)
def test_a_packed_model_gives_the_tokens_of_the_widened_one(types, tmp_path, tokens):
    packed, wide = packed_model(tmp_path, types)
    assert tokens(packed) == tokens(wide)


@pytest.mark.parametrize(
    ("types", "words"),
    [
        (None, "quantization_config.types must say in which type"),
        ({"model.layers.0.self_attn.q_proj": "IQ2_XS"}, "q_proj must be one of Q4_0"),
        ({"model.layers.0.self_attn.q_proj": "Q4_0"}, "q_proj.weight' must have the shape"),
    ],
)
def test_types_that_lie_are_refused_by_name(types, words, tmp_path, tokens):
    packed, _ = packed_model(tmp_path, {"q": "Q8_0"})
    path = packed / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    settings = config["quantization_config"]
    settings["types"] = None if types is None else settings["types"] | types
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError) as error:
        tokens(packed)
    assert words in str(error.value)
