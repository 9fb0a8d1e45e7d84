"""Vectors out of the engine: in this process, and from another one."""

import asyncio

import numpy as np
import pytest
import torch

from pagedcore.engine import wire
from pagedcore.errors import RequestError
from pagedcore.pooling import PoolingParams
from pagedcore.request import SamplingParams
from pagedcore.testing.fake_engine import FakeEngine, fake_vector

PROMPTS = [[5], [6, 7, 8], list(range(10, 47)), list(range(60, 160)), list(range(10, 44))]


def reference(tiny, prompt, pooling):
    with torch.inference_mode():
        hidden = tiny.reference.model(torch.tensor([prompt])).last_hidden_state[0]
    vector = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[pooling]
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("budget", [8, 512])
def test_vectors_are_those_of_the_hidden_states_whole_or_in_chunks(tiny, budget, in_flight):
    with tiny.llm(max_num_batched_tokens=budget, in_flight=in_flight) as llm:
        for pooling in ("last", "mean", "cls"):
            for prompt, output in zip(PROMPTS, llm.embed(PROMPTS, pooling), strict=True):
                assert output.prompt_token_ids == prompt
                assert np.abs(output.vector - reference(tiny, prompt, pooling)).max() < 1e-5


def test_a_batch_gives_what_each_prompt_gives_alone(tiny):
    with tiny.llm(enable_prefix_caching=False) as llm:
        together = llm.embed(PROMPTS, "mean")
        alone = [llm.embed(prompt, "mean")[0] for prompt in PROMPTS]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.vector - other.vector).max() < 1e-6


def test_a_vector_is_scaled_unless_it_is_asked_not_to_be(tiny):
    with tiny.llm() as llm:
        [scaled] = llm.embed("héllo")
        [raw] = llm.embed("héllo", PoolingParams(normalize=False))
    assert scaled.prompt == "héllo"
    assert np.linalg.norm(scaled.vector) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(raw.vector) > 1.5
    assert np.abs(scaled.vector - raw.vector / np.linalg.norm(raw.vector)).max() < 1e-6


def test_vectors_and_text_run_side_by_side(tiny):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with tiny.llm() as llm:
        alone = llm.generate([5, 6, 7], params)[0].outputs[0].token_ids
        stream = llm.stream([5, 6, 7], params)
        next(stream)
        vectors = llm.embed(PROMPTS, "mean")
        *_, last = stream
    assert last.outputs[0].token_ids == alone
    assert all(len(output.vector) for output in vectors)


def test_a_prompt_that_is_too_long_is_refused_before_anything_runs(tiny):
    with tiny.llm(max_model_len=64) as llm:
        assert len(llm.embed([[5] * 64], "mean")) == 1
        with pytest.raises(RequestError, match="65 tokens"):
            llm.embed([[5], [5] * 65])
        with pytest.raises(RequestError, match="cannot be cut"):
            llm.embed([[5]], PoolingParams(dimensions=8))
        assert not llm.engine.has_work


def test_hidden_states_that_are_not_finite_fail_their_request_alone(tiny):
    with tiny.llm() as llm:
        embedding = llm.engine._executor._model._embedding.weight
        with torch.inference_mode():
            kept = embedding[200].clone()
            embedding[200] = float("nan")
            good, bad = llm.embed([[5, 6], [5, 200]])
            embedding[200] = kept
    assert len(good.vector)
    assert "not finite" in bad.message


def test_a_client_gets_the_vector_of_the_engines_model(serve, run):
    serve(FakeEngine())

    async def use(client):
        prompts = [[1, 2, 3], [9], [4, 4]]
        return prompts, await asyncio.gather(*map(client.embed, prompts))

    prompts, vectors = run(use)
    for prompt, vector in zip(prompts, vectors, strict=True):
        settled = PoolingParams(pooling="last", normalize=True)
        assert np.array_equal(vector, fake_vector(prompt, settled))


def test_a_client_that_leaves_ends_its_request(serve, run, paused):
    """CANCEL-1"""
    engine = serve(FakeEngine()).engine

    async def use(client):
        with paused(engine):
            task = asyncio.create_task(client.embed([1, 2, 3]))
            await asyncio.to_thread(engine.wait_for, lambda e: len(e.live_ids) == 1)
            task.cancel()
            await asyncio.to_thread(engine.wait_for, lambda e: len(e.aborted) == 1)
        return client.num_inflight

    assert run(use) == 0


@pytest.mark.parametrize("fields", [{"pooling": "scores"}, {"dimensions": 9}])
def test_what_the_model_cannot_do_is_refused(serve, run, fields):
    serve(FakeEngine())

    async def use(client):
        with pytest.raises(RequestError):
            await client.embed([1], PoolingParams(**fields))

    run(use)


def test_a_model_that_was_not_made_to_generate_does_not(serve, run):
    serve(FakeEngine(task="embed"))

    async def use(client):
        with pytest.raises(RequestError, match="cannot generate"):
            await client.generate([1], SamplingParams()).admitted()
        return await client.embed([1])

    assert len(run(use)) == 8


def test_a_failure_of_the_engine_is_told(serve, run):
    engine = serve(FakeEngine()).engine

    async def use(client):
        engine.fail_running("it broke")
        with pytest.raises(RuntimeError, match="it broke"):
            await client.embed([1])

    run(use)


def test_vectors_go_to_the_connection_that_asked():
    from pagedcore.step import StepOutput

    ids = [wire.engine_id(1, 5), wire.engine_id(2, 5)]
    output = StepOutput(np.empty(0, np.int64), np.empty(0, np.int32))
    output.vectors = {i: np.array([k, 2.5], np.float32) for k, i in enumerate(ids)}
    parts = wire.split_by_connection(output)
    for k, connection in enumerate((1, 2)):
        sent = wire.decode_from_server(wire.encode(parts[connection])[4:])
        assert np.frombuffer(sent.vectors[5], np.float32).tolist() == [k, 2.5]
