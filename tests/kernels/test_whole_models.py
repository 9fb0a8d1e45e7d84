"""An engine on the kernels says what transformers says: a window, capped scores, GELUs, experts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pagedcore_models
from pagedcore import LLM, SamplingParams
from pagedcore.execution.torch_quantized import widen_grouped
from pagedcore.testing.tiny_models import greedy_tokens, save_tiny_model
from pagedcore_quantization.mxfp4 import float4

CASES = pagedcore_models.pagedcore_model_cases()
PROMPTS = [[7, 100, 31, 8, 260, 45, 9, 12, 77, 200, 3, 55], [42, 17]]


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM"])
def test_an_engine_on_the_kernels_says_what_transformers_says(architecture, tmp_path, device):
    reference = save_tiny_model(tmp_path, CASES[architecture].config, num_hidden_layers=2)
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    settings = dict(dtype="float32", device=device, backend="triton", max_model_len=64)
    with LLM(str(tmp_path), num_gpu_blocks_override=9, **settings) as llm:
        outputs = llm.generate(PROMPTS, greedy, progress=False)
    expected = [greedy_tokens(reference, prompt, 3) for prompt in PROMPTS]
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_over_whole_numbers_the_kernels_say_what_plain_torch_says(tmp_path, device):
    save_tiny_model(tmp_path, CASES["Gemma2ForCausalLM"].config, num_hidden_layers=2)
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    settings = dict(dtype="float32", device=device, max_model_len=64, kv_cache_dtype="int8")
    said = []
    for backend in ("triton", "torch"):
        with LLM(str(tmp_path), backend=backend, num_gpu_blocks_override=9, **settings) as llm:
            outputs = llm.generate(PROMPTS, greedy, progress=False)
            said.append([output.outputs[0].token_ids for output in outputs])
    assert said[0] == said[1]


def test_experts_of_four_bits_that_stay_packed_say_what_their_wide_weights_say(tmp_path, device):
    reference = save_tiny_model(tmp_path, CASES["GptOssForCausalLM"].config, num_hidden_layers=1)
    tensors, own = load_file(tmp_path / "model.safetensors"), dict(reference.named_parameters())
    rng = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, rows = tensors.pop(name).shape
        shape = (experts, rows, inputs // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
        scales = torch.randint(121, 125, shape[:3], dtype=torch.uint8, generator=rng)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        weight = float4(blocks.flatten(0, 1), scales.flatten(0, 1))
        wide = widen_grouped(weight, torch.float32).view(experts, rows, inputs)
        with torch.no_grad():
            own[name].copy_(wide.mT)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    settings = dict(dtype="float32", device=device, backend="triton", max_model_len=16)
    settings |= dict(max_num_batched_tokens=16, max_num_seqs=2)  # in which a start measures
    with LLM(str(tmp_path), num_gpu_blocks_override=9, **settings) as llm:
        outputs = llm.generate(PROMPTS, greedy, progress=False)
    expected = [greedy_tokens(reference, prompt, 2) for prompt in PROMPTS]
    assert [output.outputs[0].token_ids for output in outputs] == expected
