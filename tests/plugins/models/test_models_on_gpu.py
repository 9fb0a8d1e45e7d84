"""Tokens on a GPU are those of plain torch there, with graphs and without, alone and together."""

import pytest
import torch

import pagedcore_models
from pagedcore import LLM, SamplingParams
from pagedcore.testing.model_case import SIZES
from pagedcore.testing.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)

FAMILIES = {
    "llama": {"head_dim": 64, "tie_word_embeddings": True},
    "mistral": {"head_dim": 64, "sliding_window": 20},
    "qwen2": {"hidden_size": 256, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64},
    "Gemma2ForCausalLM": {"head_dim": 64, "sliding_window": 20},
    "Gemma3ForCausalLM": {"head_dim": 64, "sliding_window": 20},
    "MixtralForCausalLM": {"head_dim": 64},
    "Qwen2MoeForCausalLM": {"hidden_size": 256},
    "Phi3ForCausalLM": {"hidden_size": 256},
    "GraniteForCausalLM": {"hidden_size": 256},
    "Olmo2ForCausalLM": {"hidden_size": 256},
    "SmolLM3ForCausalLM": {"hidden_size": 256},
    "CohereForCausalLM": {"hidden_size": 256, "use_qk_norm": True},
    "Cohere2ForCausalLM": {"hidden_size": 256, "sliding_window": 20},
    "GlmForCausalLM": {"head_dim": 64},
    "Glm4ForCausalLM": {"head_dim": 64},
    "Starcoder2ForCausalLM": {"hidden_size": 256, "sliding_window": 20},
    "GPT2LMHeadModel": {"hidden_size": 256},
    "OPTForCausalLM": {"hidden_size": 256, "word_embed_proj_dim": 256},
}
"""Fields of a tiny model, by a name that `save_tiny_model` knows, or by the architecture's."""

CASES = pagedcore_models.pagedcore_model_cases()


def save_model(folder, family):
    kind = CASES[family].config if family in CASES else family
    return save_tiny_model(folder, kind, **FAMILIES[family])


def tokens_of(folder, prompts, *, together=True, **options):
    settings = dict(dtype="float32", num_gpu_blocks_override=200, device="cuda") | options
    batches = [prompts] if together else [[prompt] for prompt in prompts]
    with LLM(str(folder), **settings) as llm:
        outputs = [out for batch in batches for out in llm.generate(batch, GREEDY, progress=False)]
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_plain_torch(family, tmp_path, prompts):
    save_model(tmp_path, family)
    expected = tokens_of(tmp_path, prompts, backend="torch")
    for eager in (True, False):
        for together in (True, False):
            tokens = tokens_of(tmp_path, prompts, enforce_eager=eager, together=together)
            assert tokens == expected, f"{eager=}, {together=}"


@pytest.mark.parametrize("model_type", ["gpt_neox", "olmoe"])
def test_tokens_of_transformers_code_are_those_of_plain_torch(model_type, tmp_path, prompts):
    save_tiny_model(tmp_path, {**SIZES, "model_type": model_type, "hidden_size": 256})
    expected = tokens_of(tmp_path, prompts, backend="torch")
    for together in (True, False):
        assert tokens_of(tmp_path, prompts, together=together) == expected, f"{together=}"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_random_weights_are_drawn_on_the_gpu(family, tmp_path, prompts):
    save_tiny_model(tmp_path, family, head_dim=64)
    first = tokens_of(tmp_path, prompts, load_format="dummy")
    assert tokens_of(tmp_path, prompts, load_format="dummy") == first
