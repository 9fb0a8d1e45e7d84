"""The example plugin, installed as a stranger's distribution, found and run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "my-plugin"

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
def environment(tmp_path_factory):
    """An environment in which the example is installed beside this workspace."""
    target = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*install, *options, str(EXAMPLE)], check=True, timeout=120)
    return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def run(environment, *command):
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_plugin_is_listed_and_passes_its_test(environment):
    listed = run(environment, "-m", "pagedcore.cli", "plugins", "list")
    assert listed.returncode == 0, listed.stderr
    assert "ParallelForCausalLM" in listed.stdout
    tested = run(environment, "-m", "pagedcore.cli", "plugins", "test", "my-plugin")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_its_model_gives_the_same_tokens_chunked_and_whole(environment, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    result = run(environment, "-c", GENERATE, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "same tokens"
