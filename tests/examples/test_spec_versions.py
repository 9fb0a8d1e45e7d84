"""A distribution that was built for version 1 of the hook spec, beside other versions of it."""

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

NEXT_MINOR = """
import sys
import numpy as np
from pagedcore import EngineConfig, SamplingParams, hookspecs
from pagedcore._markers import hookspec
from pagedcore.engine.build import build_engine
from pagedcore.plugins import load_plugins
from pagedcore.request import Request

@hookspec
def pagedcore_things():
    pass

hookspecs.SPEC_VERSION = (1, 1)
hookspecs.pagedcore_things = pagedcore_things
plugins = load_plugins()
assert plugins.hook.pagedcore_things() == []
config = EngineConfig.from_options(model=sys.argv[1], load_format="dummy", device="cpu",
    dtype="float32", max_num_seqs=1, cpu_kv_cache_gib=0.001, scheduling_policy="shortest-first")
engine = build_engine(config, plugins=plugins)
params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
for i, length in enumerate((40, 10, 30)):
    prompt = np.arange(1, 1 + length, dtype=np.int32)
    engine.add(Request(id=i, prompt_token_ids=prompt, params=params))
order = []
while engine.has_work:
    output = engine.step()
    order += [] if output is None else [end.request_id for end in output.finished]
print(order)
"""

NEXT_MAJOR = """
import pagedcore.builtin
from pagedcore import hookspecs
from pagedcore.errors import PluginError
from pagedcore.plugins import load_plugins

hookspecs.SPEC_VERSION = (2, 0)
pagedcore.builtin.pagedcore_requires = ">=2,<3"
try:
    load_plugins(only=["my-policy"])
except PluginError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def installed(install):
    return install("my-policy")


def test_a_plugin_for_spec_1_works_unchanged_at_1_1(installed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert installed.run("-c", NEXT_MINOR, str(tmp_path)).strip() == "[1, 2, 0]"


def test_a_plugin_for_spec_1_is_refused_by_name_at_2_0(installed):
    said = installed.run("-c", NEXT_MAJOR)
    assert "plugin 'my-policy' from my-policy failed to load" in said
    assert "it needs hook spec >=1,<2, this is 2.0" in said
    assert "--disable-plugin my-policy" in said
