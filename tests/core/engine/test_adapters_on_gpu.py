"""Adapters (LoRA) on a GPU: kernels and graphs say what plain torch says."""

import json

import numpy as np
import pytest
import torch

from pagedcore import EngineConfig, SamplingParams
from pagedcore.engine.build import build_engine
from pagedcore.plugins import register
from pagedcore.request import Request
from pagedcore.testing.drawn_adapters import save_drawn_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1024,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    hidden_act="silu",
    dtype="float32",
)
PARTS = {
    "self_attn.q_proj": (128, 128),
    "self_attn.v_proj": (128, 64),
    "mlp.up_proj": (128, 256),
    "mlp.down_proj": (256, 128),
}
NAMES = ["a", None, "b", "a", "c", None, "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    for seed, name in enumerate("abc"):
        shapes = {f"model.layers.{i}.{n}": shape for i in range(2) for n, shape in PARTS.items()}
        save_drawn_adapter(folder / name, dict(list(shapes.items())[seed:]), seed=seed)
    return folder


def said(folder, **options):
    """What each of NAMES says twice: first beside long prompts, then in steady decode steps."""
    import pagedcore.builtin
    import pagedcore_kernels
    import pagedcore_models

    config = EngineConfig.from_options(
        model=str(folder), load_format="dummy", dtype="float32", max_num_seqs=8, max_loras=2,
        num_gpu_blocks_override=400, max_model_len=512, max_cpu_loras=3, enable_lora=True,
        lora_modules=[f"{name}={folder / name}" for name in "abc"], **options,
    )  # fmt: skip
    plugins = register(
        {"core": pagedcore.builtin, "kernels": pagedcore_kernels, "models": pagedcore_models}
    )
    engine = build_engine(config, plugins=plugins)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    tokens = {}
    for turn in range(2):
        for number, name in enumerate(NAMES):
            prompt = np.arange(5 + number, 25 + 13 * number, dtype=np.int32) * 7 % 1024
            request_id = 100 * turn + number
            tokens[request_id] = []
            engine.add(Request(id=request_id, prompt_token_ids=prompt, params=params, adapter=name))
        while engine.has_work:
            output = engine.step()
            if output is not None:
                for i, token in zip(output.request_ids, output.tokens, strict=True):
                    tokens[int(i)].append(int(token))
    engine.shutdown()
    return tokens


def test_graphs_and_kernels_say_what_plain_torch_says(folder):  # LORA-1
    plain = said(folder, backend="torch")
    assert plain[0] != plain[1]
    assert said(folder, backend="triton", enforce_eager=True) == plain
    assert said(folder, backend="triton") == plain
