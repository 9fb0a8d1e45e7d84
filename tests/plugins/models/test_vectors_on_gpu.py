"""Vectors on a GPU are those of transformers on the CPU, beside text that is generated, too."""

import numpy as np
import pytest
import torch

from pagedcore import LLM, SamplingParams
from pagedcore.testing.model_case import SIZES
from pagedcore.testing.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILIES = {
    "bert": {"model_type": "bert"},
    "xlm-roberta": {"model_type": "xlm-roberta", "pad_token_id": 1, "type_vocab_size": 1},
    "modernbert": {"model_type": "modernbert", "local_attention": 8},
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
}
SPECIAL = {"pad_token_id": 258, "cls_token_id": 256, "sep_token_id": 257}


def expected(reference, prompt):
    with torch.inference_mode():
        vector = reference(torch.tensor([prompt])).last_hidden_state[0].mean(0)
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_transformers(family, backend, tmp_path, prompts):
    fields = {**SIZES, **SPECIAL, **FAMILIES[family], "hidden_size": 256}
    reference = save_tiny_model(tmp_path, fields, reference="AutoModel")
    padding = fields["pad_token_id"]  # has no position, and stands in no text
    prompts = [[token + (token == padding) for token in prompt] for prompt in prompts]
    for dtype, least in (("float32", 0.99999), ("bfloat16", 0.99)):
        settings = dict(dtype=dtype, device="cuda", backend=backend, num_gpu_blocks_override=200)
        with LLM(str(tmp_path), **settings) as llm:
            for prompt, output in zip(prompts, llm.embed(prompts, "mean"), strict=True):
                assert output.vector @ expected(reference, prompt) > least


def test_vectors_of_a_decoder_come_beside_tokens_of_its_graphs(tmp_path, prompts):
    reference = save_tiny_model(tmp_path, "qwen3", head_dim=64)
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    settings = dict(dtype="float32", device="cuda", max_num_batched_tokens=16, max_num_seqs=8)
    with LLM(str(tmp_path), num_gpu_blocks_override=200, **settings) as llm:
        alone = [out.outputs[0].token_ids for out in llm.generate(prompts, greedy)]
        streams = [llm.stream(prompt, greedy) for prompt in prompts]
        for stream in streams:
            next(stream)
        for prompt, output in zip(prompts, llm.embed(prompts, "mean"), strict=True):
            assert np.abs(output.vector - expected(reference.model, prompt)).max() < 1e-3
        for stream, tokens in zip(streams, alone, strict=True):
            assert list(stream)[-1].outputs[0].token_ids == tokens
