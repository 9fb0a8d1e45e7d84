"""An engine out of parts that plugins bring: a source, a policy, an observer."""

import json

import numpy as np
import pytest

from pagedcore import EngineConfig, SamplingParams, hookimpl
from pagedcore.engine.build import build_engine
from pagedcore.errors import UnknownNameError
from pagedcore.plugins import register
from pagedcore.request import Request

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


class Shelf:
    """Keeps models under a short name."""

    def __init__(self, folder):
        self._folder = folder

    def fetch(self, name, revision):
        return self._folder / name


class ShortestFirst:
    """Short prompts are served first; the longest one yields."""

    def order(self, request):
        return len(request.prompt_token_ids)

    def victim(self, running):
        return int(np.argmax([len(r.prompt_token_ids) for r in running]))


class Plugin:
    def __init__(self, folder):
        self._folder = folder
        self.seen = []
        self.fails = False

    @hookimpl
    def pagedcore_sources(self):
        return {"shelf": lambda: Shelf(self._folder)}

    @hookimpl
    def pagedcore_policies(self):
        return {"shortest-first": ShortestFirst}

    @hookimpl
    def pagedcore_step_finished(self, stats):
        self.seen.append(stats)
        if self.fails:
            raise RuntimeError("an observer's own fault")


@pytest.fixture
def plugin(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    return Plugin(tmp_path)


def build(plugin, **options):
    import pagedcore.builtin
    import pagedcore_models

    config = EngineConfig.from_options(
        **{
            "model": "shelf:tiny",
            "load_format": "dummy",
            "device": "cpu",
            "dtype": "float32",
            "cpu_kv_cache_gib": 0.001,
            "max_num_seqs": 1,
            **options,
        }
    )
    plugins = {"core": pagedcore.builtin, "models": pagedcore_models, "mine": plugin}
    return build_engine(config, plugins=register(plugins))


def add(engine, request_id, length, max_tokens=3):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    prompt = np.arange(1, length + 1, dtype=np.int32)
    engine.add(Request(id=request_id, prompt_token_ids=prompt, params=params))


def finish(engine):
    order = []
    while engine.has_work:
        output = engine.step()
        order += [] if output is None else [end.request_id for end in output.finished]
    return order


def test_a_policy_of_a_plugin_orders_the_queue(plugin):
    engine = build(plugin, scheduling_policy="shortest-first")
    for request_id, length in enumerate((40, 10, 30, 20)):
        add(engine, request_id, length)
    assert finish(engine) == [1, 3, 2, 0]


def test_an_unknown_scheme_names_what_is_installed(plugin):
    with pytest.raises(UnknownNameError, match="did you mean 'shelf'"):
        build(plugin, model="shelve:tiny")


def test_an_observer_sees_every_step(plugin):
    engine = build(plugin)
    add(engine, 0, 5, max_tokens=4)
    finish(engine)
    assert [stats.num_tokens for stats in plugin.seen] == [5, 1, 1, 1]
    assert sum(stats.num_outputs for stats in plugin.seen) == 4
    assert plugin.seen[-1].num_running == 0
    assert plugin.seen[0].cache_usage > 0


def test_an_observer_that_raises_is_left_alone_and_breaks_nothing(plugin, caplog):
    plugin.fails = True
    engine = build(plugin)
    add(engine, 0, 5)
    assert finish(engine) == [0]
    assert len(plugin.seen) == 1
    assert "mine" in caplog.text
