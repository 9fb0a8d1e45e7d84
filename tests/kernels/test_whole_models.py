"""An engine on the kernels says what transformers says: a window, capped scores, GELUs."""

import pytest

import pagedcore_models
from pagedcore import LLM, SamplingParams
from pagedcore.testing.tiny_models import greedy_tokens, save_tiny_model

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
