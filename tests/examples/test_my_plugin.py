"""The example plugin, installed as a stranger's distribution, found and run."""

import json

import pytest

CONFIG = dict(
    architectures=["ParallelForCausalLM"],
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=200,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    dtype="float32",
)

CONFTEST = """
pytest_plugins = ["pagedcore.testing.pytest_plugin"]
"""

PROMISES = """
import pytest

@pytest.mark.pagedcore_plugin("my-plugin")
def test_my_plugin_keeps_its_promises(pagedcore_check):
    pagedcore_check()
"""

GENERATE = """
import sys
from pagedcore import EngineConfig, SamplingParams
from pagedcore.engine.build import build_engine
from pagedcore.request import Request
import numpy as np

tokens = {}
for budget in (64, 5):
    config = EngineConfig.from_options(model=sys.argv[1], load_format="dummy", device="cpu",
        dtype="float32", max_num_seqs=4, max_num_batched_tokens=budget, cpu_kv_cache_gib=0.01)
    engine = build_engine(config)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for i in range(3):
        prompt = np.arange(1, 20 + i, dtype=np.int32)
        engine.add(Request(id=i, prompt_token_ids=prompt, params=params))
    outputs = {i: [] for i in range(3)}
    while engine.has_work:
        output = engine.step()
        for i, token in zip(output.request_ids, output.tokens) if output else ():
            outputs[int(i)].append(int(token))
    tokens[budget] = outputs
assert tokens[64] == tokens[5]
assert all(len(ids) == 12 for ids in tokens[64].values())
print("same tokens")
"""


@pytest.fixture(scope="module")
def installed(install):
    return install("my-plugin")


def test_the_plugin_is_listed(installed):
    assert "ParallelForCausalLM" in installed.pagedcore("plugins", "list")


def test_the_plugin_passes_the_model_kit(installed):
    said = installed.pagedcore("plugins", "test", "my-plugin")
    for dtype in ("float32", "bfloat16"):
        assert f"ok      model ParallelForCausalLM: {dtype}, torch: within" in said
    assert "ok      model ParallelForCausalLM: shards = whole: within" in said
    assert "failed: 0" in said


def test_its_model_gives_the_same_tokens_chunked_and_whole(installed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert installed.run("-c", GENERATE, str(tmp_path)).strip() == "same tokens"


def test_pytest_runs_its_checks_as_cases_of_a_test(installed, tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(PROMISES)
    options = ["-q", "-p", "no:cacheprovider", "--strict-markers", "-c", "/dev/null"]
    said = installed.run("-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path))
    assert "5 passed" in said
