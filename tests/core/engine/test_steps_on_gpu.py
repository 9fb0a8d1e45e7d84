"""On a GPU: the same tokens from kernels, graphs and plain torch, and no waiting in the loop."""

import json

import numpy as np
import pytest
import torch

from pagedcore import EngineConfig, SamplingParams
from pagedcore.engine.build import build_engine
from pagedcore.plugins import register
from pagedcore.request import Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1024,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    hidden_act="silu",
    attention_bias=False,
    dtype="float32",
)


def plugins():
    import pagedcore.builtin
    import pagedcore_kernels
    import pagedcore_models

    return register(
        {"core": pagedcore.builtin, "kernels": pagedcore_kernels, "models": pagedcore_models}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(SHAPE))
    return path


@pytest.fixture
def make(folder):
    engines = []

    def make(**options):
        settings = dict(
            model=str(folder),
            load_format="dummy",
            dtype="float32",
            device="cuda",
            max_num_seqs=16,
            kv_cache_memory_bytes=2**27,
        )
        config = EngineConfig.from_options(**{**settings, **options})
        engines.append(build_engine(config, plugins=plugins()))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


def prompts(count):
    rng = np.random.default_rng(7)
    return [rng.integers(0, 1024, rng.integers(3, 90)).astype(np.int32) for _ in range(count)]


def run(engine, asked, first_id=0, **params):
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 64, "ignore_eos": True, **params})
    outputs = {}
    for i, prompt in enumerate(asked):
        outputs[first_id + i] = []
        engine.add(Request(id=first_id + i, prompt_token_ids=prompt, params=params))
    while engine.has_work:
        output = engine.step()
        if output is not None:
            for request_id, token in zip(output.request_ids, output.tokens, strict=True):
                outputs[int(request_id)].append(int(token))
            assert not [end for end in output.finished if end.message]
    return list(outputs.values())


def run_late(engine, asked, first_id, **params):
    """As `run`, but the prompts arrive one by one, while those before them decode."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 64, "ignore_eos": True, **params})
    waiting = list(enumerate(asked))
    outputs = {first_id + i: [] for i, _ in waiting}
    while engine.has_work or waiting:
        if waiting and sum(map(len, outputs.values())) >= 5 * waiting[0][0]:
            i, prompt = waiting.pop(0)
            engine.add(Request(id=first_id + i, prompt_token_ids=prompt, params=params))
        output = engine.step()
        if output is not None:
            for request_id, token in zip(output.request_ids, output.tokens, strict=True):
                outputs[int(request_id)].append(int(token))
    return list(outputs.values())


@pytest.fixture(scope="module")
def expected(folder):
    config = EngineConfig.from_options(
        model=str(folder),
        load_format="dummy",
        dtype="float32",
        device="cuda",
        backend="torch",
        max_num_seqs=16,
        kv_cache_memory_bytes=2**27,
        async_scheduling=False,
    )
    engine = build_engine(config, plugins=plugins())
    tokens = [run(engine, [prompt], i)[0] for i, prompt in enumerate(prompts(6))]
    engine.shutdown()
    return tokens


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("overlapped", [False, True])
def test_greedy_tokens_are_those_of_plain_torch_batched_and_alone(
    make, expected, eager, overlapped
):
    engine = make(enforce_eager=eager, async_scheduling=overlapped)
    for round_ in range(3):  # a graph is captured when it is needed again
        assert run(engine, prompts(6), 100 * round_) == expected
    alone = [run(engine, [prompt], 1000 + i)[0] for i, prompt in enumerate(prompts(6))]
    assert alone == expected


def test_chunks_and_cached_prefixes_change_no_token(make, expected):
    engine = make(max_num_batched_tokens=16)
    assert run(engine, prompts(6)) == expected
    assert run(engine, prompts(6), 100) == expected


@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "seeded"])
def test_short_extensions_as_graphs_change_no_token(make, seed):
    """Several at once, behind cached prefixes, and beside sequences that decode."""
    wishes = dict(temperature=0.0) if seed is None else dict(temperature=0.9, seed=seed)
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 1024, 300).astype(np.int32)
    asked = [
        np.concatenate((shared, rng.integers(0, 1024, n).astype(np.int32))) for n in (3, 17, 40, 90)
    ]
    eager = make(enforce_eager=True, async_scheduling=False)
    wanted = [run(eager, [prompt], i, **wishes)[0] for i, prompt in enumerate(asked)]
    engine = make()
    for round_ in range(4):
        assert run(engine, asked, 100 * round_, **wishes) == wanted
        alone = [run(engine, [p], 1000 * round_ + 50 + i, **wishes) for i, p in enumerate(asked)]
        assert [tokens for [tokens] in alone] == wanted
        assert run_late(engine, asked, 1000 * round_ + 500, **wishes) == wanted


def test_a_prompt_of_one_token_in_a_row_that_has_just_been_left_changes_no_token(make):
    rng = np.random.default_rng(5)
    asked = [rng.integers(0, 1024, n).astype(np.int32) for n in (9, 1, 1, 5, 1)]
    eager = make(enforce_eager=True, async_scheduling=False)
    wanted = [run(eager, [prompt], i)[0] for i, prompt in enumerate(asked)]
    for overlapped in (False, True):
        engine = make(async_scheduling=overlapped)
        assert [run(engine, [prompt], i)[0] for i, prompt in enumerate(asked)] == wanted


def test_graphs_that_are_prepared_in_advance_give_the_same_tokens(make, expected):
    engine = make()
    while engine.prepare():
        pass
    assert run(engine, prompts(6)) == expected


def test_seeded_draws_do_not_depend_on_graphs_or_batch(make):
    wishes = dict(temperature=0.8, seed=11)
    for extra in ({}, {"top_k": 20, "top_p": 0.9}):
        engine = make(enforce_eager=True)
        eager = run(engine, prompts(5), **wishes, **extra)
        engine = make()
        for round_ in range(3):
            assert run(engine, prompts(5), 100 * round_, **wishes, **extra) == eager
        assert run(engine, prompts(5)[:1], 1000, **wishes, **extra) == eager[:1]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_decoding_step_never_waits_for_the_device(make):
    engine = make()
    run(engine, prompts(8))
    run(engine, prompts(8), 100)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    for i, prompt in enumerate(prompts(8)):
        engine.add(Request(id=200 + i, prompt_token_ids=prompt, params=params))
    for _ in range(6):
        engine.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while engine.has_work:
        engine.step()
