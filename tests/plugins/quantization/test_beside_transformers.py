"""Quantized checkpoints as transformers loads them on a CPU: the same matrices, the same logits.

It dequantizes them where the libraries that it asks for are installed. Those of AWQ, GPTQ and
fbgemm's float8 need a GPU, or one to build; these formats are held to their own definitions in
`test_packed_formats`.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore.cli import main
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.quantizing.writer import WriterOptions
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.sources.gguf_convert import convert
from pagedcore.testing.paged_model import PagedModel
from pagedcore.testing.tiny_models import save_tiny_model
from pagedcore.testing.written_blocks import GGUF_KINDS, gguf_matrix
from pagedcore.testing.written_formats import WRITTEN
from pagedcore_models.cases import CASES
from pagedcore_models.gpt_oss import GptOssForCausalLM
from pagedcore_models.llama import LlamaForCausalLM
from pagedcore_quantization import pagedcore_quantizers, pagedcore_weight_writers

transformers = pytest.importorskip("transformers", reason="it is what is compared with")
pytestmark = pytest.mark.filterwarnings(  # what a checkpoint says goes before what we ask for
    "ignore:You passed `quantization_config`:UserWarning"
)

SIZES = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
)
PROMPT = list(range(40, 62))
COMPRESSED = [
    *("fp8 by output", "int8 w8a8", "int8 weights", "int8 weights with zeros"),
    *("compressed 4", "compressed 4 with zeros", "compressed 8"),
]
"""Without those that put inputs into groups by an index, which compressed-tensors gave up."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    save_tiny_model(folder, **SIZES)
    return folder


def store(plain, target, write, config):
    """Copy a model, its layers' matrices as `write` stores them."""
    target.mkdir()
    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.endswith("_proj"):
            tensors |= {f"{layer}.{what}": value for what, value in write(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    fields["quantization_config"] = dict(config)
    (target / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return target


def written(plain, target, form, renamed=()):
    """A model in a format of WRITTEN, scales in 32 bits: transformers multiplies in their type."""
    names = dict(renamed)

    def write(weight):
        tensors, _ = WRITTEN[form].write(weight)
        return {
            names.get(what, what): tensor.float() if tensor.dtype == torch.float16 else tensor
            for what, tensor in tensors.items()
        }

    return store(plain, target, write, WRITTEN[form].config)


def theirs(folder, **options):
    """The model as transformers loads it, with nothing missing and nothing left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model


def quantizer_of(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = config["quantization_config"]
    return pagedcore_quantizers()[settings["quant_method"]](settings)


def our_layer(folder, name, shape):
    weights = Checkpoint(folder).tensors(torch.float32, torch.device("cpu"))
    return quantizer_of(folder).linear(
        weights, TorchOps("cpu"), [name], shape[1], [shape[0]], bias=False, dim=None
    )


def check_matrices(folder, model, tolerance=0.0):
    """Compare what each layer stands for; returns how many there are."""
    matrices = {
        name.removesuffix(".weight"): tensor
        for name, tensor in model.state_dict().items()
        if name.endswith("_proj.weight")
    }
    for name, matrix in matrices.items():
        ours = our_layer(folder, name, matrix.shape).apply(torch.eye(matrix.shape[1])).t()
        torch.testing.assert_close(ours, matrix, rtol=tolerance, atol=0)
    return len(matrices)


@torch.inference_mode()
def check_logits(folder, model, kind=LlamaForCausalLM):
    ours = PagedModel(folder, kind, quantizer=quantizer_of(folder)).run(PROMPT)
    torch.testing.assert_close(ours, model(torch.tensor([PROMPT])).logits[0], atol=2e-4, rtol=1e-4)


def needs(*libraries):
    for name in libraries:
        pytest.importorskip(name, reason="transformers loads this format with it")


def dequantizing():
    needs("compressed_tensors")
    return transformers.CompressedTensorsConfig(dequantize=True)


@pytest.mark.parametrize(
    ("form", "libraries"),
    [
        ("fp8", ["compressed_tensors"]),
        ("int8", ["compressed_tensors"]),
        ("fp8-block", ["accelerate"]),
    ],
)
def test_what_quantize_writes_is_what_transformers_reads(form, libraries, plain, tmp_path):
    """Its tokenizer too, and nothing of it is asked for by another name."""
    needs(*libraries)
    folder = tmp_path / "made"
    words = ["quantize", str(plain), "--format", form, "--output", str(folder), "--device", "cpu"]
    assert main(words) == 0
    options = {} if form == "fp8-block" else {"quantization_config": dequantizing()}
    model = theirs(folder, **options)
    writer = pagedcore_weight_writers()[form](WriterOptions())
    for name, tensor in load_file(plain / "model.safetensors").items():
        expected = writer.rounded(tensor) if name.endswith("_proj.weight") else tensor
        assert torch.equal(model.state_dict()[name], expected), name
    assert check_matrices(folder, model) == 14
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer("a b").input_ids
        == transformers.AutoTokenizer.from_pretrained(plain)("a b").input_ids
    )


TRANSFORMERS_NAMES = {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}


@pytest.mark.parametrize("form", ["fp8 blocks", "fp8 by matrix"])
def test_float8_is_what_transformers_widens_it_to(form, plain, tmp_path):
    needs("accelerate")
    folder = written(plain, tmp_path / "stored", form, TRANSFORMERS_NAMES)
    if form == "fp8 by matrix":  # as it says what is not given: it takes blocks for granted
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fields["quantization_config"]["weight_block_size"] = None
        (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    model = theirs(folder)
    assert check_matrices(folder, model) == 14
    check_logits(folder, model)


@pytest.mark.parametrize("form", COMPRESSED)
def test_compressed_tensors_are_what_transformers_widens_them_to(form, plain, tmp_path):
    config = dequantizing()
    folder = written(plain, tmp_path / "stored", form)
    model = theirs(folder, quantization_config=config)
    assert check_matrices(folder, model) == 14
    if form != "int8 w8a8":  # which rounds activations too, and the widened model does not
        check_logits(folder, model)


@pytest.mark.parametrize("form", ["int8 w8a8", "fp8 by output"])
@torch.inference_mode()
def test_products_that_round_both_sides_are_as_near_as_those_of_transformers(form, plain, tmp_path):
    needs("compressed_tensors")
    folder = written(plain, tmp_path / "stored", form)
    model = theirs(folder)
    model(torch.tensor([PROMPT]))  # the first of which unpacks its layers
    layer = model.model.layers[1].mlp.down_proj
    x = torch.randn(17, 256, generator=torch.Generator().manual_seed(2))
    found = layer(x)
    method = our_layer(folder, "model.layers.1.mlp.down_proj", (128, 256))
    ours, exact = method.apply(x), x @ method.apply(torch.eye(256))
    assert (ours - exact).norm() <= 1.1 * (found - exact).norm()
    assert (ours - found).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize(
    "form", ["bitsandbytes nf4", "bitsandbytes nf4 nested", "bitsandbytes int8"]
)
@pytest.mark.filterwarnings("ignore")  # of a library that is not ours
def test_bitsandbytes_is_what_transformers_widens_it_to(form, plain, tmp_path):
    needs("accelerate", "bitsandbytes")
    folder = written(plain, tmp_path / "stored", form)
    model = theirs(folder).dequantize(torch.float32)
    assert check_matrices(folder, model, tolerance=1e-6) == 14
    check_logits(folder, model)


def test_experts_in_mxfp4_are_what_transformers_widens_them_to(tmp_path):
    save_tiny_model(tmp_path, CASES["GptOssForCausalLM"].config)
    tensors = load_file(tmp_path / "model.safetensors")
    rng = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, rows = tensors.pop(name).shape
        shape = (experts, rows, inputs // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
        scales = torch.randint(123, 126, shape[:3], dtype=torch.uint8, generator=rng)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    fields = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    fields["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    model = theirs(tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True))
    check_logits(tmp_path, model.float(), GptOssForCausalLM)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    for ours, others in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm")):
        name = name.replace(ours, others)
    if not name.startswith("model.layers."):
        return name.replace("lm_head", "output")
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"


def save_gguf(gguf, model, path, kind):
    """As llama.cpp's converter does it, by the library of llama.cpp's own authors."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *map(str, range(config.vocab_size - 3))])
    writer.add_token_merges(["a b"])
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # which llama.cpp rotates in pairs
            size = config.hidden_size // config.num_attention_heads
            values = values.reshape(-1, 2, size // 2, values.shape[1]).swapaxes(1, 2)
            values = np.ascontiguousarray(values).reshape(tensor.shape)
        if not name.endswith("_proj.weight"):
            writer.add_tensor(gguf_name(name), values)
            continue
        number = gguf.GGMLQuantizationType[kind]
        blocks, _ = gguf_matrix(kind, torch.from_numpy(values))
        writer.add_tensor(gguf_name(name), blocks.numpy(), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_gguf_blocks_are_what_transformers_widens_them_to(kind, tmp_path):
    gguf = pytest.importorskip("gguf", reason="it writes the file, as llama.cpp's converter does")
    sizes = SIZES | {"hidden_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    plain = save_tiny_model(tmp_path / "plain", dtype=torch.bfloat16, **sizes)
    save_gguf(gguf, plain, tmp_path / "model.gguf", kind)
    folder = tmp_path / "packed"
    folder.mkdir()
    convert(tmp_path / "model.gguf", folder, lambda done, total: None, packed=True)
    options = transformers.GgufConfig(dequantize=True)
    model = theirs(tmp_path, gguf_file="model.gguf", quantization_config=options)
    assert check_matrices(folder, model) == 7
    check_logits(folder, model)


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_blocks_stand_for_what_the_library_of_ggml_reads(kind):
    gguf = pytest.importorskip("gguf", reason="it is what blocks are read with")
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    weight[:2] = 0
    blocks, meant = gguf_matrix(kind, weight)
    read = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    torch.testing.assert_close(torch.from_numpy(read), meant, rtol=1e-6, atol=1e-6)
