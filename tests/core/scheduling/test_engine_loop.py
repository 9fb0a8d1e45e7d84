"""The engine's loop over the scheduler and the hash model: overlap changes nothing but time."""

import numpy as np
import pytest

from pagedcore.cache_spec import CacheGroup, CacheSpec
from pagedcore.config import SchedulerConfig
from pagedcore.engine.engine import Engine
from pagedcore.engine.info import EngineInfo
from pagedcore.request import Request, SamplingParams
from pagedcore.scheduling.policies import FirstComeFirstServed
from pagedcore.scheduling.scheduler import Scheduler
from pagedcore.testing.hash_model import Fault, HashModel, draw, reference_tags

VOCAB_SIZE = 50


class CountingModel(HashModel):
    """Refuses the launches that it is told to."""

    def __init__(self, **options):
        super().__init__(**options)
        self.refused = set()
        self.num_refused = 0

    def launch(self, plan):
        if self.num_launched + self.num_refused in self.refused:
            self.num_refused += 1
            raise RuntimeError("out of memory")
        return super().launch(plan)


def make_engine(*, overlap, num_blocks=40, budget=16):
    groups = [CacheGroup(CacheSpec(num_kv_heads=1, head_dim=1), (0,))]
    sizes = dict(num_blocks=num_blocks, block_size=4, max_model_len=32, groups=groups)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=budget),
        enable_prefix_caching=True,
        hash_algorithm="sha256",
        kv_watermark=0.0,
        policy=FirstComeFirstServed(),
        seed=0,
        **sizes,
    )
    model = CountingModel(num_rows=4, vocab_size=VOCAB_SIZE, **sizes)
    info = EngineInfo(
        model="hash",
        served_model_names=("hash",),
        max_model_len=32,
        vocab_size=VOCAB_SIZE,
        block_size=4,
        num_blocks=num_blocks,
        max_num_seqs=4,
    )
    return Engine(scheduler, model, info, async_scheduling=overlap), model


def add(engine, request_id, length=7, **params):
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 10, **params})
    prompt = (np.arange(length) * request_id % VOCAB_SIZE).astype(np.int32)
    request = Request(id=request_id, prompt_token_ids=prompt, params=params, eos_token_id=1)
    engine.add(request)
    return request


def run(engine):
    """All tokens, and all endings, by id."""
    tokens, ended = {}, {}
    while engine.has_work:
        output = engine.step()
        if output is None:
            continue
        for i, token in zip(output.request_ids.tolist(), output.tokens.tolist(), strict=True):
            assert i not in ended
            tokens.setdefault(i, []).append(token)
        ended |= {end.request_id: str(end.reason) for end in output.finished}
    return tokens, ended


def reference(request):
    """Tokens of a request that is alone and never cached."""
    outputs = []
    while len(outputs) < request.params.max_tokens:
        states = reference_tags([*request.prompt_token_ids.tolist(), *outputs], 0, [None])[1]
        outputs.append(draw(int(states[-1]), request, 0, 0, VOCAB_SIZE))
        if outputs[-1] == request.eos_token_id:
            break
    return outputs


@pytest.mark.parametrize("num_blocks", [12, 40])
def test_overlap_gives_the_same_tokens_in_as_many_passes(num_blocks):
    """ASYNC-7: greedy tokens are equal, and forward passes differ by one per request at most."""
    results, launched = [], []
    for overlap in (False, True):
        engine, model = make_engine(overlap=overlap, num_blocks=num_blocks)
        requests = [add(engine, i, length=3 + i) for i in range(1, 9)]
        results.append(run(engine))
        launched.append(model.num_launched)
    assert results[0] == results[1]
    assert results[0][0] == {request.id: reference(request) for request in requests}
    if num_blocks == 40:
        assert abs(launched[0] - launched[1]) <= len(requests)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_launch_that_is_refused_ends_only_those_in_it(overlap, caplog):
    """R18: no step is launched after it that would build on rows the device does not know."""
    engine, model = make_engine(overlap=overlap)
    add(engine, 1)
    model.refused = {3}
    ended, waiting = {}, [add(engine, 2)]
    for _ in range(6):
        output = engine.step()
        ended |= {end.request_id: str(end.reason) for end in output.finished} if output else {}
    assert ended == {1: "error", 2: "error"}
    assert "could not be launched" in caplog.text
    waiting.append(add(engine, 3))
    assert run(engine)[0] == {3: reference(waiting[-1])}
    assert engine.stats()["kv_cache_usage_perc"] == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_fails_on_the_device_ends_only_those_in_it(overlap, caplog):
    """R18, ERR-4"""
    engine, model = make_engine(overlap=overlap)
    add(engine, 1)
    model.faults.extend([None, None, Fault()])
    _, ended = run(engine)
    assert ended == {1: "error"}
    assert "a step failed" in caplog.text
    request = add(engine, 2)
    assert run(engine) == ({2: reference(request)}, {2: run_end(request)})


def run_end(request):
    return "stop" if request.eos_token_id in reference(request) else "length"


@pytest.mark.parametrize("overlap", [False, True])
def test_numbers_that_are_not_finite_end_one_sequence(overlap):
    """ERR-4: the others' tokens are those of a run without it."""
    engine, model = make_engine(overlap=overlap)
    requests = [add(engine, i) for i in (1, 2, 3)]
    model.faults.extend([None, None, Fault(rows=frozenset([1]))])
    tokens, ended = run(engine)
    assert ended[2] == "error"
    for request in (requests[0], requests[2]):
        assert tokens[request.id] == reference(request)


def test_an_abort_between_steps_frees_everything(caplog):
    """CANCEL-1, EN-4, EN-9"""
    engine, model = make_engine(overlap=True)
    for i in range(1, 5):
        add(engine, i, max_tokens=20)
    for _ in range(4):
        engine.step()
    engine.abort([1, 2, 3, 4])
    assert engine.stats()["kv_cache_usage_perc"] == 0
    launched = model.num_launched
    assert run(engine) == ({}, {})
    assert model.num_launched == launched
