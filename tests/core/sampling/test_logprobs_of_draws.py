"""Log-probabilities of drawn and of prompt tokens: values, ranks, modes, and who gets them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.execution import sampler as sampler_module
from pagedcore.execution import torch_sampling
from pagedcore.execution.sampler import Sampler
from pagedcore.request import Request, SamplingParams
from pagedcore.step import Admission

VOCAB = 20


class TorchSampling:
    sample = staticmethod(torch_sampling.sample)


def draw(logits, *wishes, mode="raw_logprobs"):
    """Draw once for sequences with these parameters: tokens [S], log-probabilities by index."""
    logits = torch.as_tensor(np.atleast_2d(logits)).float()
    sampler = make_sampler(mode, logits.shape[1])
    admissions = []
    for row, wanted in enumerate(wishes):
        prompt = np.array([1, 2], np.int32)
        request = Request(id=row, prompt_token_ids=prompt, params=SamplingParams(**wanted))
        admissions.append(Admission(row, request, prompt, seed=row))
    sampler.admit(admissions)
    rows = np.arange(len(wishes), dtype=np.int32)
    known = torch.full((len(wishes),), 2)
    table = torch.tensor([[1, 2, 0]] * len(wishes), dtype=torch.int32)
    drawn = sampler.draw(logits, rows, torch.from_numpy(rows).long(), known, table, 2)
    tokens = drawn.tokens.numpy().astype(np.int32)
    return tokens, None if drawn.logprobs is None else drawn.logprobs.result(tokens)


def make_sampler(mode, vocab_size=VOCAB):
    device = torch.device("cpu")
    return Sampler(
        TorchSampling(), num_rows=8, vocab_size=vocab_size, device=device, logprobs_mode=mode
    )


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_token_comes_first_then_the_most_likely():
    logits = np.arange(VOCAB, dtype=np.float32)
    _, found = draw(logits, dict(temperature=0.0, allowed_token_ids=[4], logprobs=3))
    entry = found[0]
    assert entry.token_ids.tolist() == [4, 19, 18, 17]
    assert entry.ranks.tolist() == [16, 1, 2, 3]
    np.testing.assert_allclose(entry.logprobs, log_softmax(logits)[[4, 19, 18, 17]], rtol=1e-5)
    assert (entry.token_ids.dtype, entry.ranks.dtype) == (np.int32, np.int32)
    assert entry.logprobs.dtype == np.float32


def test_a_token_among_the_most_likely_is_not_repeated():
    logits = np.arange(VOCAB, dtype=np.float32)
    _, found = draw(logits, dict(temperature=0.0, allowed_token_ids=[18], logprobs=3))
    assert found[0].token_ids.tolist() == [18, 19, 17]
    assert found[0].ranks.tolist() == [2, 1, 3]


def test_none_of_the_most_likely_gives_the_token_alone():
    _, found = draw(np.arange(VOCAB), dict(temperature=0.0, logprobs=0))
    assert found[0].token_ids.tolist() == [19]
    assert found[0].ranks.tolist() == [1]


def test_minus_one_gives_the_whole_vocabulary():
    _, found = draw(np.arange(VOCAB), dict(temperature=0.0, logprobs=-1))
    assert found[0].token_ids.tolist() == list(range(VOCAB))[::-1]
    assert found[0].ranks.tolist() == list(range(1, VOCAB + 1))


def test_equal_tokens_share_a_rank():
    logits = np.zeros(VOCAB)
    logits[[3, 5]] = 2.0
    _, found = draw(logits, dict(temperature=0.0, logprobs=4))
    assert found[0].token_ids[0] == 3
    assert found[0].ranks.tolist() == [1, 1, 3, 3]


def test_only_those_who_asked_get_an_entry_of_the_size_they_asked_for():
    logits = np.random.default_rng(0).normal(size=(4, VOCAB)).astype(np.float32)
    quiet = dict(temperature=0.0)
    wishes = (quiet, dict(temperature=0.0, logprobs=1), quiet, dict(temperature=0.0, logprobs=5))
    tokens, found = draw(logits, *wishes)
    assert sorted(found) == [1, 3]
    assert [len(found[i].token_ids) for i in (1, 3)] == [1, 5]
    assert all(found[i].token_ids[0] == tokens[i] for i in found)
    assert draw(logits[:1], quiet)[1] is None


FILTERED = dict(temperature=0.5, top_k=3, logit_bias={0: 4.0}, logprobs=4)


def test_raw_modes_look_before_edits_and_filters():
    logits = np.linspace(0, 3, VOCAB).astype(np.float32)
    for mode, values in (("raw_logprobs", log_softmax(logits)), ("raw_logits", logits)):
        _, found = draw(logits, FILTERED, mode=mode)
        np.testing.assert_allclose(
            found[0].logprobs, values[found[0].token_ids], rtol=1e-5, err_msg=mode
        )


def test_processed_modes_look_after_edits_temperature_and_filters():
    logits = np.linspace(0, 3, VOCAB).astype(np.float32)
    scores = np.full(VOCAB, -np.inf)
    left = [0, 18, 19]  # 0 by its bias
    scores[left] = (logits + np.where(np.arange(VOCAB) == 0, 4.0, 0.0))[left] / 0.5
    for mode, values in (("processed_logprobs", log_softmax(scores)), ("processed_logits", scores)):
        tokens, found = draw(logits, FILTERED, mode=mode)
        entry = found[0]
        assert tokens[0] in left
        assert set(left) <= set(entry.token_ids.tolist())
        np.testing.assert_allclose(entry.logprobs, values[entry.token_ids], rtol=1e-5, err_msg=mode)


def test_processed_log_probabilities_of_a_mixed_batch_are_each_rows_own():
    logits = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    wishes = (
        dict(temperature=0.0, logprobs=2),
        dict(temperature=2.0, top_p=0.3),
        dict(temperature=2.0, top_k=2, logprobs=2),
    )
    _, together = draw(logits, *wishes, mode="processed_logprobs")
    _, alone = draw(logits[:1], wishes[0], mode="processed_logprobs")
    np.testing.assert_array_equal(together[0].logprobs, alone[0].logprobs)
    assert np.exp(together[2].logprobs).sum() == pytest.approx(1.0)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(0, VOCAB), num=st.integers(1, 4))
def test_entries_agree_with_a_sort_of_all_values(seed, k, num):
    logits = np.random.default_rng(seed).integers(-3, 4, (num, VOCAB)).astype(np.float32)
    tokens, found = draw(logits, *[dict(temperature=1.0, logprobs=k)] * num)
    for i in range(num):
        values, entry = log_softmax(logits[i]), found[i]
        assert len(entry.token_ids) in (k, k + 1)
        assert len(set(entry.token_ids.tolist())) == len(entry.token_ids)
        assert entry.token_ids[0] == tokens[i]
        np.testing.assert_allclose(entry.logprobs, values[entry.token_ids], rtol=1e-5)
        above = (logits[i][None, :] > logits[i][entry.token_ids, None]).sum(-1)
        assert entry.ranks.tolist() == (above + 1).tolist()
        assert (np.diff(entry.logprobs[1:]) <= 0).all()


def test_pieces_give_what_the_whole_gives(monkeypatch):
    logits = np.random.default_rng(2).normal(size=(5, VOCAB)).astype(np.float32)
    wishes = [dict(temperature=1.0, top_p=0.8, logprobs=i) for i in range(5)]
    _, whole = draw(logits, *wishes, mode="processed_logprobs")
    monkeypatch.setattr(sampler_module, "_MAX_SCORES", 2 * VOCAB)
    _, pieces = draw(logits, *wishes, mode="processed_logprobs")
    for i, entry in whole.items():
        assert pieces[i].token_ids.tolist() == entry.token_ids.tolist()
        np.testing.assert_allclose(pieces[i].logprobs, entry.logprobs, rtol=1e-6)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
def test_prompt_positions_report_the_token_that_follows(mode):
    logits = np.random.default_rng(3).normal(size=(3, VOCAB)).astype(np.float32)
    following = torch.tensor([4, 0, 19])

    entries = make_sampler(mode).prompt_logprobs(torch.from_numpy(logits), following, 2)

    values = log_softmax(logits) if mode.endswith("logprobs") else logits
    assert [int(entry.token_ids[0]) for entry in entries] == following.tolist()
    for position, entry in enumerate(entries):
        np.testing.assert_allclose(entry.logprobs, values[position][entry.token_ids], rtol=1e-5)


def test_a_broken_row_does_not_disturb_the_log_probabilities_of_others():
    logits = np.random.default_rng(4).normal(size=(2, VOCAB)).astype(np.float32)
    alone = draw(logits[:1], dict(temperature=0.0, logprobs=3))[1][0]
    logits[1] = np.nan
    _, found = draw(logits, *[dict(temperature=0.0, logprobs=3)] * 2)
    np.testing.assert_array_equal(found[0].logprobs, alone.logprobs)
