"""MXFP4: what a byte stands for, and whole GPT-OSS checkpoints whose experts are stored so."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore.errors import ModelError
from pagedcore.execution.expert_ops import Clamp
from pagedcore.execution.random_weights import RandomWeights
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.execution.torch_quantized import widen_grouped
from pagedcore.testing.paged_model import PagedModel
from pagedcore.testing.tiny_models import save_tiny_model
from pagedcore_models.cases import CASES
from pagedcore_models.gpt_oss import GptOssForCausalLM
from pagedcore_quantization import pagedcore_quantizers
from pagedcore_quantization.mxfp4 import Mxfp4, float4

SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def value(code, scale):
    """By the definition of e2m1: a sign, two bits of exponent, one of fraction."""
    sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
    magnitude = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)
    return (-1) ** sign * magnitude * 2.0 ** (scale - 127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_and_scale_stands_for_two_numbers(dtype):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    scales = torch.tensor([[127, 126, 128, 120, 134, 0, 254, 1, *[127] * 8]], dtype=torch.uint8)
    got = widen_grouped(float4(blocks, scales), dtype)
    want = [
        value(code, scale)
        for block, scale in zip(blocks[0].tolist(), scales[0].tolist(), strict=True)
        for byte in block
        for code in (byte & 15, byte >> 4)
    ]
    assert got.shape == (1, 16 * 32)
    assert got.dtype == dtype
    torch.testing.assert_close(got[0], torch.tensor(want).to(dtype), rtol=0, atol=0)


def test_a_scale_that_is_no_number_makes_its_group_nan():
    blocks = torch.zeros(1, 2, 16, dtype=torch.uint8)
    weight = float4(blocks, torch.tensor([[255, 127]], dtype=torch.uint8))
    got = widen_grouped(weight, torch.float32)[0]
    assert got[:32].isnan().all()
    assert (got[32:] == 0).all()


@pytest.fixture
def stored(tmp_path):
    """A folder whose experts are random codes, and the model that transformers makes of them."""
    reference = save_tiny_model(tmp_path, CASES["GptOssForCausalLM"].config)
    tensors = load_file(tmp_path / "model.safetensors")
    rng = torch.Generator().manual_seed(0)
    own = dict(reference.named_parameters())
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, rows = tensors.pop(name).shape
        shape = (experts, rows, inputs // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
        scales = torch.randint(123, 126, shape[:3], dtype=torch.uint8, generator=rng)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        with torch.no_grad():
            weight = float4(blocks.flatten(0, 1), scales.flatten(0, 1))
            wide = widen_grouped(weight, torch.float32)
            own[name].copy_(wide.view(experts, rows, inputs).mT)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": SETTINGS}))
    return tmp_path, reference


@torch.inference_mode()
def test_a_checkpoint_of_four_bits_gives_the_logits_of_its_wide_weights(stored):
    folder, reference = stored
    model = PagedModel(folder, GptOssForCausalLM, quantizer=Mxfp4(SETTINGS))
    prompt = list(range(40, 62))
    want = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(model.run(prompt), want, atol=1e-4, rtol=1e-4)


def test_the_format_of_a_checkpoint_cannot_be_made_while_loading():
    with pytest.raises(ModelError, match="use fp8"):
        pagedcore_quantizers()["mxfp4"]({})


def test_inputs_that_do_not_fill_their_groups_are_refused():
    weights = RandomWeights(torch.float32, torch.device("meta"), 0)
    sizes = dict(num_experts=2, h=40, width=32, clamp=Clamp(1.7, 7.0))
    with pytest.raises(ModelError, match="its 40 inputs are no multiple of 32"):
        Mxfp4(SETTINGS).stacked_experts(weights, TorchOps("cpu"), "x", **sizes)
