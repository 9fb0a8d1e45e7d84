"""Processors of logits that a plugin brings (`pagedcore_logits_processors`), through an engine."""

import json

import numpy as np
import pytest
import torch

import pagedcore.builtin
import pagedcore_models
from pagedcore import EngineConfig, SamplingParams, hookimpl
from pagedcore.engine.build import build_engine
from pagedcore.errors import RequestError
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


class Only:
    """Lets nothing through but the token that a request asks for, plus how many it has."""

    def __init__(self, vocab_size, device):
        self.made_for = (vocab_size, device)
        self.batches = []

    def check(self, arguments):
        if not isinstance(arguments, int):
            raise RequestError(f"a token id is needed, not {arguments!r}")

    def apply(self, logits, batch):
        self.batches.append(list(batch.arguments))
        count = batch.num_known - batch.num_prompt
        wanted = torch.tensor(batch.arguments) + count
        assert batch.tokens.shape[0] == len(logits)
        return torch.full_like(logits, -torch.inf).scatter(1, wanted[:, None], 0.0)


class Failing(Only):
    def check(self, arguments):
        pass

    def apply(self, logits, batch):
        raise RuntimeError("a processor's own fault")


class WrongShape(Failing):
    def apply(self, logits, batch):
        return logits[:, 1:]


class Plugin:
    def __init__(self):
        self.made = []

    @hookimpl
    def pagedcore_logits_processors(self):
        def make(kind):
            def factory(vocab_size, device):
                self.made.append(kind(vocab_size, device))
                return self.made[-1]

            return factory

        return {"only": make(Only), "failing": make(Failing), "wrong-shape": make(WrongShape)}


@pytest.fixture
def plugin():
    return Plugin()


@pytest.fixture
def engine(plugin, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = EngineConfig.from_options(
        model=str(tmp_path),
        load_format="dummy",
        device="cpu",
        dtype="float32",
        cpu_kv_cache_gib=0.001,
        max_num_seqs=4,
    )
    plugins = {"core": pagedcore.builtin, "models": pagedcore_models, "mine": plugin}
    return build_engine(config, plugins=register(plugins))


def run(engine, *asked):
    """The tokens and the end of each request, which run together."""
    for i, processors in enumerate(asked):
        params = SamplingParams(
            temperature=0, max_tokens=3, ignore_eos=True, logits_processors=processors
        )
        prompt = np.arange(1, 6 + i, dtype=np.int32)
        engine.add(Request(id=i, prompt_token_ids=prompt, params=params))
    tokens = {i: [] for i in range(len(asked))}
    ends = {}
    while engine.has_work:
        output = engine.step()
        if output is not None:
            for request_id, token in zip(output.request_ids, output.tokens, strict=True):
                tokens[int(request_id)].append(int(token))
            ends |= {end.request_id: end.reason for end in output.finished}
    return [tokens[i] for i in range(len(asked))], [ends[i] for i in range(len(asked))]


def test_a_processor_sees_all_who_ask_for_it_at_once_and_nobody_else(engine, plugin):
    plain, _ = run(engine, None, None, None)
    assert plugin.made == []
    tokens, _ = run(engine, {"only": 40}, None, {"only": 70})
    assert tokens == [[40, 41, 42], plain[1], [70, 71, 72]]
    (made,) = plugin.made
    assert made.made_for == (100, torch.device("cpu"))
    assert made.batches == [[40, 70]] * 3


@pytest.mark.parametrize("name", ["failing", "wrong-shape"])
def test_a_processor_that_fails_ends_who_asked_for_it_and_nobody_else(engine, name, caplog):
    plain, _ = run(engine, None, None)
    tokens, ends = run(engine, {name: None}, None)
    assert ends == ["error", "length"]
    assert tokens[1] == plain[1]
    assert f"the logits processor {name!r} failed" in caplog.text


def test_a_name_that_no_plugin_offers_is_refused_with_the_nearest(engine):
    with pytest.raises(RequestError, match="did you mean 'only'") as error:
        run(engine, {"olny": 1})
    assert error.value.param == "logits_processors"
    assert not engine.has_work


def test_arguments_are_checked_when_a_request_arrives(engine):
    with pytest.raises(RequestError, match="only: a token id is needed, not 'x'"):
        run(engine, {"only": "x"})


@pytest.mark.parametrize("named", [["only"], {1: 2}, "only"])
def test_names_are_mapped_to_arguments(named):
    with pytest.raises(RequestError, match="must map names to arguments"):
        SamplingParams(logits_processors=named)
