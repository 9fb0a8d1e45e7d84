"""Converted models against transformers' own, and what config.json says of them."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pagedcore.errors import ModelError
from pagedcore.sources.gguf_config import generation_config, model_config
from pagedcore.sources.gguf_convert import _bfloat16, convert
from pagedcore.sources.gguf_quants import BLOCK_TYPES
from pagedcore.sources.gguf_reader import GgufFile

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
LAYER_NAMES |= {
    f"self_attn.{part}_{kind}": f"attn_{part}{gguf}"
    for part in "qkv"
    for kind, gguf in (
        ("proj.weight", ".weight"),
        ("proj.bias", ".bias"),
        ("norm.weight", "_norm.weight"),
    )
}
SIZES = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def gguf_name(name):
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}"


def pairs_together(weight, num_heads):
    """As llama.cpp's converter stores Q and K of its architecture `llama`."""
    shape = (num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def rope_factors(head_dim, theta, factor, original):
    """As llama.cpp's converter has them for Llama 3.1, one at a time."""
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / 4:
            yield 1.0
        elif wavelength > original:
            yield factor
        else:
            smooth = (original / wavelength - 1) / 3
            yield 1 / ((1 - smooth) / factor + smooth)


def write_model(writer, arch, model):
    """Describe a model of transformers, whose weights are bfloat16 already."""
    config = model.config
    rope = config.rope_parameters
    writer.set("general.architecture", arch)
    for key, value in {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
    }.items():
        writer.set(f"{arch}.{key}", value)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim != config.hidden_size // config.num_attention_heads:
        writer.set(f"{arch}.attention.key_length", head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.set(f"{arch}.rope.scaling.type", rope["rope_type"])
        writer.set(f"{arch}.rope.scaling.factor", rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        writer.set(f"{arch}.rope.scaling.original_context_length", original)
    if rope["rope_type"] == "llama3":
        original = rope["original_max_position_embeddings"]
        factors = rope_factors(head_dim, rope["rope_theta"], rope["factor"], original)
        writer.tensor("rope_freqs.weight", np.array(list(factors), np.float32))
    tokens = [f"t{i}" for i in range(config.vocab_size)]
    writer.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", "qwen2")
    writer.set("tokenizer.ggml.tokens", tokens).set("tokenizer.ggml.merges", [])
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = pairs_together(values, heads)
        writer.tensor(gguf_name(name), values, 0 if values.ndim == 1 else 30)
    return writer


def default(theta=10000.0):
    return {"rope_type": "default", "rope_theta": theta}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS = {
    "llama with tied heads": ("llama", dict(tie_word_embeddings=True)),
    "llama with wide heads": ("llama", dict(tie_word_embeddings=False, head_dim=16)),
    "llama 3": ("llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama with linear rope": ("llama", dict(tie_word_embeddings=False, rope_parameters=LINEAR)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=default(1e6))),
    "qwen2 with yarn": ("qwen2", dict(tie_word_embeddings=False, rope_parameters=YARN)),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True, head_dim=16, rope_parameters=default(1e6))),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_converted_model_is_the_model_that_it_was(tmp_path, writer, case):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    arch, options = MODELS[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(arch, **SIZES | options)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # all the same until they are trained
                weight.uniform_(0.5, 1.5)
            weight.copy_(weight.to(torch.bfloat16))
    path = write_model(writer, arch, model).save(tmp_path / "x.gguf")

    convert(path, tmp_path, lambda done, total: None)
    read, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )

    assert not any(report.values())
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert type(read) is type(model)


def opened(tmp_path, writer):
    return GgufFile.open(writer.save(tmp_path / "x.gguf"))


def test_config_json_says_what_the_metadata_says(tmp_path, tiny):
    tiny.set("tokenizer.ggml.padding_token_id", 1)
    assert model_config(opened(tmp_path, tiny)) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 6,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }


@pytest.mark.parametrize(
    ("extra", "ends"),
    [
        ({}, 1),
        ({"tokenizer.ggml.eot_token_id": 4}, [1, 4]),
        ({"tokenizer.ggml.eot_token_id": 1}, 1),
        ({"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.eom_token_id": 5}, [1, 4, 5]),
    ],
)
def test_every_token_that_ends_a_turn_ends_a_generation(tmp_path, tiny, extra, ends):
    for key, value in extra.items():
        tiny.set(key, value)
    assert generation_config(opened(tmp_path, tiny))["eos_token_id"] == ends


def test_a_turn_end_that_the_metadata_forgets_is_found_by_its_name(tmp_path, tiny):
    tiny.set("tokenizer.ggml.tokens", ["<s>", "</s>", "a", "b", "ab", "<|im_end|>"])
    tiny.set("tokenizer.ggml.merges", ["a b"])
    assert generation_config(opened(tmp_path, tiny))["eos_token_id"] == 1  # an ordinary token
    tiny.set("tokenizer.ggml.token_type", np.array([3, 3, 1, 1, 1, 3]), 5)
    assert generation_config(opened(tmp_path, tiny))["eos_token_id"] == [1, 5]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", "mamba", "architecture 'mamba', and those read are llama"),
        ("general.architecture", 5, "has a int for 'general.architecture'"),
        ("split.count", 3, "one part of several"),
        ("llama.expert_count", 8, "mixture of experts"),
        ("llama.block_count", 0, "must be 1 to"),
        ("llama.block_count", 2**31 - 1, "has 2147483647 layers and only"),
        ("llama.block_count", 2, "lacks the tensor 'blk.1."),
        ("llama.embedding_length", 33, "'token_embd.weight' of shape (6, 32), not (6, 33)"),
        ("llama.feed_forward_length", 65, "'blk.0.ffn_"),
        ("llama.attention.head_count", 3, "not a multiple of"),
        ("llama.attention.key_length", 15, "with heads of 15"),
        ("llama.attention.value_length", 8, "with heads of 16"),
        ("llama.rope.dimension_count", 8, "with heads of 16"),
        ("llama.attention.sliding_window", 128, "sliding window"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "must be"),
        ("llama.rope.freq_base", float("inf"), "must be"),
        ("llama.rope.freq_base", True, "has a bool for"),
        ("llama.rope.scaling.type", "longrope", "those read are linear, yarn, llama3"),
        ("tokenizer.ggml.eos_token_id", 6, "has 6 for its eos token, of 6 tokens"),
        ("tokenizer.ggml.eot_token_id", 2**32 - 1, "for its eot token"),
    ],
)
def test_metadata_that_describes_no_model_is_refused(tmp_path, tiny, key, value, words):
    if key == "llama.attention.head_count":
        tiny.set("llama.attention.head_count_kv", 2)
    if key == "llama.rope.scaling.type":
        tiny.set("llama.rope.scaling.factor", 2.0)
    tiny.set(key, value)
    path = tiny.save(tmp_path / "x.gguf")
    with pytest.raises(ModelError) as caught:
        convert(path, tmp_path, lambda done, total: None)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_k.weight",
    ],
)
def test_what_is_missing_is_named(tmp_path, tiny, key):
    path = tiny.drop(key).save(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=f"lacks .*{key}"):
        convert(path, tmp_path, lambda done, total: None)


def test_a_tensor_that_the_architecture_does_not_have_is_refused(tmp_path, tiny):
    tiny.tensor("blk.0.ffn_gate_inp.weight", np.zeros((4, 32), np.float32))
    path = tiny.save(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=r"has a tensor 'blk\.0\.ffn_gate_inp\.weight'"):
        convert(path, tmp_path, lambda done, total: None)


@pytest.mark.parametrize(
    "factors",
    [np.ones(7), np.linspace(1, 8, 8), np.full(8, np.nan), np.full(8, np.inf), np.zeros(8)],
)
def test_rope_factors_of_no_llama_3_are_refused(tmp_path, tiny, factors):
    tiny.tensor("rope_freqs.weight", factors.astype(np.float32))
    with pytest.raises(ModelError, match=r"'rope_freqs\.weight'"):
        model_config(opened(tmp_path, tiny))


def test_more_tokens_than_embeddings_are_refused_and_fewer_are_not(tmp_path, tiny):
    tiny.set("tokenizer.ggml.tokens", [*"<>abcdefg"]).drop("tokenizer.ggml.token_type")
    tiny.set("tokenizer.ggml.merges", [])
    with pytest.raises(ModelError, match="has 9 tokens and 6 embeddings"):
        model_config(opened(tmp_path, tiny))
    tiny.set("tokenizer.ggml.tokens", [*"<>ab"])
    assert model_config(opened(tmp_path, tiny))["vocab_size"] == 6


def test_weights_are_written_a_few_rows_at_a_time(tmp_path, tiny, monkeypatch):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    whole.mkdir()
    pieces.mkdir()
    path = tiny.save(tmp_path / "x.gguf")
    convert(path, whole, lambda done, total: None)
    monkeypatch.setattr("pagedcore.sources.gguf_convert.CHUNK_VALUES", 100)
    reports = []

    convert(path, pieces, lambda done, total: reports.append((done, total)))

    name = "model.safetensors"
    assert (pieces / name).read_bytes() == (whole / name).read_bytes()
    dones, totals = zip(*reports, strict=True)
    assert len(reports) > 20
    assert list(dones) == sorted(dones)
    assert set(totals) == {dones[-1]}


def test_the_weights_file_is_sound_and_its_values_are_aligned(tmp_path, tiny):
    convert(tiny.save(tmp_path / "x.gguf"), tmp_path, lambda done, total: None)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header["model.layers.0.self_attn.q_proj.weight"]["shape"] == [32, 32]
    assert header.pop("__metadata__") == {"format": "pt"}
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - length


def test_bfloat16_is_the_nearest_as_torch_has_it():
    import torch

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, np.uint64).astype(np.uint32)
    halfway = (bits & 0xFFFF0000) | 0x8000
    values = np.concatenate([bits, halfway]).view(np.float32)

    ours = torch.from_numpy(_bfloat16(values).view(np.int16)).view(torch.bfloat16)

    theirs = torch.from_numpy(values).to(torch.bfloat16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_disk_that_is_too_small_is_noticed_before_weights_are_written(
    tmp_path, tiny, monkeypatch
):
    import shutil

    small = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: small)
    with pytest.raises(OSError, match="No space left"):
        convert(tiny.save(tmp_path / "x.gguf"), tmp_path, lambda done, total: None)
    assert not (tmp_path / "model.safetensors").exists()


def test_packed_layers_keep_their_blocks_and_config_json_names_their_types(tmp_path, tiny):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    path = tiny.save(tmp_path / "tiny.gguf")
    for folder in (plain, packed):
        folder.mkdir()
        convert(path, folder, lambda done, total: None, packed=folder is packed)
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    types = config.pop("quantization_config")["types"]
    assert set(types.values()) == {"Q8_0"}
    assert sorted(name.rpartition(".")[2] for name in types) == [
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
    ]
    assert config == json.loads((plain / "config.json").read_text(encoding="utf-8"))
    widened = load_file(plain / "model.safetensors")
    for name, stored in load_file(packed / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer in types:
            rows = BLOCK_TYPES[8].dequantize(stored.numpy())
            stored = torch.from_numpy(rows).bfloat16()
        assert torch.equal(stored, widened[name]), name


@pytest.mark.parametrize("kind", ["blocks", "numbers"])
def test_an_embedding_in_blocks_is_also_kept_as_the_head_it_is(kind, tmp_path, tiny):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    if kind == "blocks":
        tiny.tensors = [t for t in tiny.tensors if t[0] != "token_embd.weight"]
        values = np.random.default_rng(1).standard_normal((6, 32), np.float32)
        tiny.tensor("token_embd.weight", values, 8)
    path = tiny.save(tmp_path / "tiny.gguf")
    for folder in (plain, packed):
        folder.mkdir()
        convert(path, folder, lambda done, total: None, packed=folder is packed)
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    stored = load_file(packed / "model.safetensors")
    widened = load_file(plain / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored["model.embed_tokens.weight"], widened)
    assert config["tie_word_embeddings"]
    assert ("lm_head" in config["quantization_config"]["types"]) == (kind == "blocks")
    assert ("lm_head.weight" in stored) == (kind == "blocks")
    if kind == "blocks":
        rows = BLOCK_TYPES[8].dequantize(stored["lm_head.weight"].numpy())
        assert torch.equal(torch.from_numpy(rows).bfloat16(), widened)
