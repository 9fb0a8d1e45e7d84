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
        self.records = []
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

    @hookimpl
    def pagedcore_request_finished(self, record):
        self.records.append(record)
        if self.fails:
            raise RuntimeError("an observer's own fault")


@pytest.fixture
def plugin(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    return Plugin(tmp_path)


def build(plugin, others=None, **options):
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
    plugins |= others or {}
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
    assert len(plugin.seen) == len(plugin.records) == 1
    assert "pagedcore_step_finished of the plugin 'mine' failed" in caplog.text
    assert engine.stats()["plugin_observers_quarantined"] == 2
    add(engine, 1, 5)
    assert finish(engine) == [1]
    assert len(plugin.seen) == len(plugin.records) == 1


def test_an_observer_sees_every_request_once_with_what_it_cost(plugin):
    engine = build(plugin, max_num_seqs=2)
    for request_id, length in enumerate((40, 5, 5)):
        add(engine, request_id, length, max_tokens=3)
    engine.step()
    engine.abort([2, 99])
    assert [(record.request.id, record.reason) for record in plugin.records] == [(2, "abort")]
    assert plugin.records[0].queue_seconds is None
    assert plugin.records[0].num_output_tokens == 0
    assert finish(engine) == [0, 1]
    assert [record.request.id for record in plugin.records] == [2, 0, 1]
    first = plugin.records[1]
    assert first.reason == "length"
    assert (first.num_prompt_tokens, first.num_output_tokens) == (40, 3)
    assert len(first.request.output_token_ids) == 3
    assert 0 <= first.queue_seconds <= first.total_seconds
    assert engine.stats()["plugin_observers_quarantined"] == 0


def test_an_observer_may_leave_out_what_it_is_told(plugin):
    class Counter:
        num_steps = 0

        @hookimpl
        def pagedcore_step_finished(self):
            self.num_steps += 1

    counter = Counter()
    engine = build(plugin, others={"counter": counter})
    add(engine, 0, 5, max_tokens=4)
    finish(engine)
    assert counter.num_steps == 4
