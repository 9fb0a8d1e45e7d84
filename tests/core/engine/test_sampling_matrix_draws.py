"""Drawn tokens: reproducible where asked, within the filters, and in the right proportions."""

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from pagedcore import SamplingParams
from pagedcore.request import OutputKind

PROMPTS = [np.random.default_rng(i).integers(0, 256, 20 + 3 * i).tolist() for i in range(4)]
LETTERS = tuple(range(64, 90))

ENGINES = {
    "plain": dict(enable_prefix_caching=False),
    "chunked": dict(max_num_batched_tokens=7, max_num_seqs=5),
    "preempted": dict(block_size=4, num_gpu_blocks_override=25),
    "in flight": dict(in_flight=True),
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tiny):
    with tiny.llm(**dict(max_model_len=96) | ENGINES[request.param]) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(tiny):
    with tiny.llm() as llm:
        yield llm


def drawn(llm, params, prompts=PROMPTS):
    """Tokens of every choice of every prompt."""
    outputs = llm.generate(prompts, params, progress=False)
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


def test_a_seed_makes_a_draw_reproducible(engine):
    params = SamplingParams(seed=11, n=3)
    first = drawn(engine, params)
    assert drawn(engine, params) == first
    assert drawn(engine, params, PROMPTS[::-1]) == first[::-1]
    assert drawn(engine, replace(params, seed=14)) != first
    assert [choices[2] for choices in first] == [
        choices[0] for choices in drawn(engine, replace(params, n=1, seed=13))
    ]


def test_without_a_seed_every_draw_is_another(engine):
    params = SamplingParams(n=4)
    choices = [tuple(tokens) for _ in range(2) for tokens in drawn(engine, params)[0]]
    assert len(set(choices)) == 8


def test_the_engines_seed_makes_all_draws_reproducible(tiny):
    runs = []
    for seed in (3, 3, 4):
        with tiny.llm(seed=seed) as llm:
            runs.append(drawn(llm, SamplingParams(n=2)))
    assert runs[0] == runs[1] != runs[2]


def test_a_drawn_token_is_one_that_the_filters_leave(engine, tiny):
    """SAMPLE-7: temperature, then min_p, then top_k, then top_p, each on what the last one left."""
    params = SamplingParams(temperature=1.5, min_p=0.05, top_k=6, top_p=0.8, n=4, seed=1)
    for prompt, choices in zip(PROMPTS, drawn(engine, params), strict=True):
        for tokens in choices:
            logits = tiny.logits(prompt + tokens)[len(prompt) - 1 : -1].double() / 1.5
            for token, row in zip(tokens, logits, strict=True):
                assert token in survivors(row.softmax(-1).numpy(), 0.05, 6, 0.8)


def survivors(p, min_p, top_k, top_p):
    """Ids that stay; borders are taken wide, for what is computed in other ways."""
    p = np.where(p >= min_p * p.max() * (1 - 1e-4), p, 0)
    p = np.where(p >= np.sort(p)[-top_k] * (1 - 1e-4), p, 0)
    order = np.argsort(-p)
    before = np.cumsum(p[order] / p.sum()) - p[order] / p.sum()
    return set(order[(before < top_p + 1e-4) & (p[order] > 0)].tolist())


def test_a_request_that_leaves_no_token_fails_alone_and_says_why(engine):  # ERR-4
    nothing = SamplingParams(allowed_token_ids=[64], bad_words=["a"], seed=1)
    params = [SamplingParams(seed=1), nothing, SamplingParams(seed=2)]
    left, failed, right = engine.generate(PROMPTS[:3], params, progress=False)
    [choice] = failed.outputs
    assert (choice.finish_reason, choice.token_ids) == ("error", [])
    assert "allowed_token_ids and bad_words leave no token" in choice.message
    assert [left.outputs[0].token_ids] == drawn(engine, params[0], PROMPTS[:1])[0]
    assert [right.outputs[0].token_ids] == drawn(engine, params[2], PROMPTS[2:3])[0]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
def test_tokens_come_as_often_as_the_model_says(plain, tiny, temperature):
    """1,536 draws of a first token: each frequency within five standard deviations."""
    params = SamplingParams(temperature=temperature, n=128, max_tokens=1)
    prompt = PROMPTS[0]
    all_params = [replace(params, seed=1000 * i) for i in range(12)]
    choices = drawn(plain, all_params, [prompt] * 12)
    tokens = [tokens[0] for of_prompt in choices for tokens in of_prompt]
    p = (tiny.logits(prompt)[-1].double() / temperature).softmax(-1).numpy()
    counts = np.bincount(tokens, minlength=len(p))
    deviation = np.abs(counts - len(tokens) * p) / np.sqrt(len(tokens) * p * (1 - p) + 1e-9)
    assert deviation[p > 0.002].max() < 5
    assert counts[p < 1e-6].sum() == 0
    assert (p > 0.002).sum() > 3


def test_a_temperature_that_is_too_low_is_raised_and_said(caplog):  # SAMPLE-3
    with caplog.at_level(logging.WARNING):
        params = SamplingParams(temperature=0.001)
    assert params.temperature == 0.01
    assert "0.001" in caplog.text
    caplog.clear()
    replace(params, n=2)
    SamplingParams(temperature=0)
    assert caplog.text == ""


def biased(logits):
    return logits + 9.0 * torch.nn.functional.one_hot(torch.tensor(5), len(logits))


def filtered(logits):
    return torch.where(logits >= logits.topk(3).values[-1], logits, -torch.inf)


@pytest.mark.parametrize(
    ("mode", "scores"),
    [
        ("raw_logprobs", lambda x: x.log_softmax(-1)),
        ("raw_logits", lambda x: x),
        ("processed_logprobs", lambda x: filtered(biased(x) / 0.5).log_softmax(-1)),
        ("processed_logits", lambda x: filtered(biased(x) / 0.5)),
    ],
)
@pytest.mark.parametrize("in_flight", [False, True])
def test_log_probabilities_are_of_the_kind_that_was_chosen(tiny, mode, scores, in_flight):
    params = SamplingParams(
        temperature=0.5, top_k=3, logit_bias={5: 9.0}, logprobs=4, seed=2, max_tokens=8
    )
    with tiny.llm(logprobs_mode=mode, in_flight=in_flight) as llm:
        for output in llm.generate(PROMPTS, params, progress=False):
            [choice] = output.outputs
            text = output.prompt_token_ids + choice.token_ids
            logits = tiny.logits(text)[len(output.prompt_token_ids) - 1 : -1]
            for token, entry, row in zip(choice.token_ids, choice.logprobs, logits, strict=True):
                expected = scores(row).numpy()
                assert entry.token_ids[0] == token
                np.testing.assert_allclose(entry.logprobs, expected[entry.token_ids], atol=1e-4)
                top = np.sort(expected)[::-1][:4]
                others = entry.logprobs[-4:] if len(entry.logprobs) == 5 else entry.logprobs
                np.testing.assert_allclose(np.sort(others)[::-1], top, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(n=3, seed=4, temperature=1.0),
        dict(n=2, seed=4, temperature=1.0, allowed_token_ids=LETTERS, stop=["bc", "e", "fgh"]),
        dict(allowed_token_ids=LETTERS, stop=["e"], include_stop_str_in_output=True),
        dict(detokenize=False, logprobs=1),
        dict(logprobs=2, prompt_logprobs=1),
        dict(allowed_token_ids=LETTERS, stop_token_ids=[70, 80, 85]),
    ],
)
def test_all_kinds_of_output_tell_the_same(engine, options):  # SAMPLE-11, DETOK-1
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 20, "n": 1, **options})
    whole = engine.generate([PROMPTS[1]], params, progress=False)[0]

    items = {
        kind: list(engine.stream(PROMPTS[1], replace(params, output_kind=kind)))
        for kind in OutputKind
    }
    assert len(items[OutputKind.FINAL_ONLY]) == 1
    for kind in (OutputKind.FINAL_ONLY, OutputKind.CUMULATIVE):
        assert told(items[kind][-1]) == told(whole)
        assert items[kind][-1].finished
    for index, choice in enumerate(whole.outputs):
        pieces = [item.outputs[index] for item in items[OutputKind.DELTA]]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [token for piece in pieces for token in piece.token_ids] == choice.token_ids
        assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == (
            choice.finish_reason,
            choice.stop_reason,
        )
        if choice.logprobs is not None:
            assert sum(len(piece.logprobs) for piece in pieces) == len(choice.logprobs)
        longer = [item.outputs[index].text for item in items[OutputKind.CUMULATIVE]]
        assert all(b.startswith(a) for a, b in itertools.pairwise(longer))
    assert len(items[OutputKind.DELTA]) > 1
    if whole.prompt_logprobs is not None:
        told_of_prompt = [len(item.prompt_logprobs) for item in items[OutputKind.DELTA]]
        assert sum(told_of_prompt) == told_of_prompt[0] == len(whole.prompt_logprobs)


def told(output):
    """Everything but log-probabilities, and how many there are of these."""
    choices = [replace(choice, logprobs=len(choice.logprobs or ())) for choice in output.outputs]
    return choices, output.prompt_token_ids, len(output.prompt_logprobs or ())
