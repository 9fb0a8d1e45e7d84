"""Decoders that make vectors: saved without a head, as Qwen3-Embedding is, or with one."""

import json

import numpy as np
import pytest
import torch

from pagedcore import LLM
from pagedcore.errors import RequestError
from pagedcore.pooling import PoolingParams
from pagedcore.testing.tiny_models import SIZES, save_tiny_model

QWEN = {**SIZES, "model_type": "qwen3", "head_dim": 32, "num_hidden_layers": 2}
PROMPTS = [[5], [6, 7, 8, 257], list(range(10, 47))]


def open_llm(folder, **options):
    settings = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8}
    return LLM(str(folder), num_gpu_blocks_override=100, **settings | options)


def last_of(reference, prompt):
    with torch.inference_mode():
        vector = reference(torch.tensor([prompt])).last_hidden_state[0, -1]
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("named", ["Qwen3Model", "Qwen3ForCausalLM"])
def test_a_decoder_without_a_head_makes_the_vectors_of_transformers(tmp_path, named):
    """As Qwen3-Embedding is published: tensors without a prefix, the name of a whole model."""
    reference = save_tiny_model(tmp_path, QWEN, reference="AutoModel")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"architectures": [named]}
    path.write_text(json.dumps(config | {"is_matryoshka": True}))
    with open_llm(tmp_path) as llm:
        assert llm.engine.info.task == "embed"
        for prompt, output in zip(PROMPTS, llm.embed(PROMPTS), strict=True):
            assert np.abs(output.vector - last_of(reference, prompt)).max() < 1e-5
        [short] = llm.embed([PROMPTS[2]], PoolingParams(dimensions=16))
        cut = last_of(reference, PROMPTS[2])[:16]
        assert np.abs(short.vector - cut / np.linalg.norm(cut)).max() < 1e-5
        with pytest.raises(RequestError, match="at most 64, not 65"):
            llm.embed("a", PoolingParams(dimensions=65))
        with pytest.raises(RequestError, match="cannot generate"):
            llm.generate("a")


def test_a_decoder_with_a_head_generates_and_embeds(tmp_path):
    reference = save_tiny_model(tmp_path, QWEN)
    with open_llm(tmp_path) as llm:
        assert llm.engine.info.task == "generate"
        [output] = llm.embed([PROMPTS[2]])
        assert np.abs(output.vector - last_of(reference.model, PROMPTS[2])).max() < 1e-5
        assert len(llm.generate([[5, 6]])[0].outputs[0].token_ids) > 0
