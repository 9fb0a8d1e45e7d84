"""The example of a weight format, installed as a stranger's distribution, found and run."""

import json

import pytest

CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=200,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    dtype="float32",
)

GENERATE = """
import sys
import numpy as np
from pagedcore import EngineConfig, SamplingParams
from pagedcore.engine.build import build_engine
from pagedcore.request import Request

config = EngineConfig.from_options(model=sys.argv[1], load_format="dummy", device="cpu",
    dtype="float32", max_num_seqs=1, cpu_kv_cache_gib=0.01, quantization="my-int8")
engine = build_engine(config)
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
engine.add(Request(id=0, prompt_token_ids=np.arange(1, 6, dtype=np.int32), params=params))
tokens = []
while engine.has_work:
    output = engine.step()
    tokens += [] if output is None else output.tokens.tolist()
print(len(tokens), "tokens")
"""


@pytest.fixture(scope="module")
def installed(install):
    return install("my-quantizer")


def test_the_format_passes_the_quantizer_kit(installed):
    said = installed.pagedcore("plugins", "test", "my-quantizer")
    assert "ok      quantizer my-int8: products in bfloat16: error" in said
    assert "failed: 0" in said


def test_a_model_runs_in_the_format(installed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert installed.run("-c", GENERATE, str(tmp_path)).strip() == "12 tokens"
