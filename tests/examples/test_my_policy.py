"""The example of a scheduling policy, installed as a stranger's distribution, found and run."""

import json

import pytest

CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=100,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    dtype="float32",
)

SERVE = """
import sys
from pagedcore import EngineConfig, SamplingParams
from pagedcore.engine.build import build_engine
from pagedcore.request import Request
import numpy as np

config = EngineConfig.from_options(model=sys.argv[1], load_format="dummy", device="cpu",
    dtype="float32", max_num_seqs=1, cpu_kv_cache_gib=0.001, scheduling_policy="shortest-first")
engine = build_engine(config)
params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
for i, length in enumerate((40, 10, 30, 20)):
    prompt = np.arange(1, 1 + length, dtype=np.int32)
    engine.add(Request(id=i, prompt_token_ids=prompt, params=params))
order = []
while engine.has_work:
    output = engine.step()
    order += [] if output is None else [end.request_id for end in output.finished]
print(order)
"""


@pytest.fixture(scope="module")
def installed(install):
    return install("my-policy")


def test_the_policy_passes_its_test(installed):
    assert "ok      policy shortest-first" in installed.pagedcore("plugins", "test", "my-policy")


def test_the_shortest_prompt_is_served_first(installed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert installed.run("-c", SERVE, str(tmp_path)).strip() == "[1, 3, 2, 0]"
