"""Masks, biases and penalties against plain loops in float64, and in their order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.execution import logits as logits_module
from pagedcore.execution.logits import History, LogitEdits, row_edits
from pagedcore.request import Request, SamplingParams

VOCAB = 24
NUM_ROWS = 5


def request(prompt=(1, 2), eos=-1, bad_words=(), **params):
    return Request(
        id=0,
        prompt_token_ids=np.array(prompt, np.int32),
        params=SamplingParams(max_tokens=40, **params),
        eos_token_id=eos,
        bad_words_token_ids=bad_words,
    )


def apply(logits, asked):
    """Edit logits [S, V]; `asked` has (request, outputs) of each sequence, in rows 0, 1 ..."""
    edits = LogitEdits(vocab_size=logits.shape[1], device=torch.device("cpu"))
    table = torch.full(
        (len(asked), 64), 5, dtype=torch.int32
    )  # what lies behind is never looked at
    num_known = []
    for row, (wanted, outputs) in enumerate(asked):
        edits.set_row(row, row_edits(wanted))
        known = [*wanted.prompt_token_ids.tolist(), *outputs]
        table[row, : len(known)] = torch.tensor(known, dtype=torch.int32)
        num_known.append(len(known))
    rows = np.arange(len(asked), dtype=np.int32)
    history = History(table, torch.from_numpy(rows), torch.tensor(num_known), max(num_known) + 3)
    edited = torch.as_tensor(logits, dtype=torch.float32).clone()
    edits.apply(edited, rows, history)
    return edited.numpy()


def edited(wanted, outputs=(), logits=None):
    """One sequence's logits [V] after its edits."""
    before = torch.zeros(1, VOCAB) if logits is None else torch.tensor([logits])
    return apply(before, [(wanted, outputs)])[0]


def masked(values):
    return np.flatnonzero(values == -np.inf).tolist()


def reference(wanted, outputs, logits):
    """One sequence, token by token."""
    params, values = wanted.params, logits.astype(np.float64)
    prompt = wanted.prompt_token_ids.tolist()
    banned = set()
    if params.allowed_token_ids is not None:
        banned |= set(range(len(values))) - set(params.allowed_token_ids)
    for word in wanted.bad_words_token_ids:
        if len(word) == 1 or tuple(outputs[-(len(word) - 1) :]) == word[:-1]:
            banned.add(word[-1])
    values[list(banned)] = -np.inf
    if len(outputs) < params.min_tokens:
        allowed_eos = values[wanted.eos_token_id]
        ending = {*params.stop_token_ids, wanted.eos_token_id} - {-1}
        values[list(ending)] = -np.inf
        if wanted.eos_token_id >= 0 and (values == -np.inf).all():
            values[wanted.eos_token_id] = allowed_eos if allowed_eos > -np.inf else 0.0
    for token, bias in (params.logit_bias or {}).items():
        values[token] += bias
    for token in {*prompt, *outputs}:
        by = params.repetition_penalty
        values[token] = values[token] / by if values[token] > 0 else values[token] * by
    for token in set(outputs):
        values[token] -= params.frequency_penalty * outputs.count(token)
        values[token] -= params.presence_penalty
    return values


def test_a_request_without_wishes_has_no_edits():
    assert row_edits(request(eos=3, temperature=0.4, top_p=0.5, stop_token_ids=[7])) is None
    assert row_edits(request(min_tokens=4)) is None  # there is no ending to wait for
    assert row_edits(request(eos=3, min_tokens=4)) is not None


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = [0.0] * VOCAB
    logits[1], logits[2], logits[9], logits[4] = 4.0, -4.0, 4.0, 4.0
    after = edited(request(prompt=(1, 2), repetition_penalty=2.0), [9], logits)
    assert after[[1, 2, 9, 4]].tolist() == [2.0, -8.0, 2.0, 4.0]


def test_frequency_counts_and_presence_does_not_and_both_leave_the_prompt_alone():
    logits = [4.0] * VOCAB
    wanted = request(prompt=(1, 1, 9), frequency_penalty=0.5, presence_penalty=0.5)
    after = edited(wanted, [9, 9, 9, 6], logits)
    assert after[[1, 9, 6, 0]].tolist() == [4.0, 2.0, 3.0, 4.0]


def test_repetition_comes_before_the_other_penalties():
    logits = [4.0] * VOCAB
    wanted = request(repetition_penalty=2.0, presence_penalty=1.0)
    assert edited(wanted, [9], logits)[9] == 1.0


def test_only_allowed_ids_are_left():
    assert masked(edited(request(allowed_token_ids=[3, 3, 8]))) == [
        i for i in range(VOCAB) if i not in (3, 8)
    ]


def test_a_bad_word_bans_its_last_token_after_the_others_were_produced():
    wanted = request(prompt=(7, 8), bad_words=((7, 8, 9), (4,), (8, 10)))
    assert masked(edited(wanted, [])) == [4]  # the prompt's 7, 8 were not produced
    assert masked(edited(wanted, [7])) == [4]
    assert masked(edited(wanted, [7, 8])) == [4, 9, 10]
    assert masked(edited(wanted, [8, 7])) == [4]
    assert masked(edited(wanted, [8])) == [4, 10]


def test_the_end_is_masked_until_enough_tokens_are_out():
    wanted = request(eos=3, min_tokens=2, stop_token_ids=[6, 3])
    assert masked(edited(wanted, [])) == [3, 6]
    assert masked(edited(wanted, [1])) == [3, 6]
    assert masked(edited(wanted, [1, 1])) == []


def test_the_end_is_let_through_when_nothing_else_is_left():
    wanted = request(eos=3, min_tokens=2, allowed_token_ids=[3])
    after = edited(wanted, [])
    assert np.isfinite(after[3])
    assert masked(after) == [i for i in range(VOCAB) if i != 3]


def test_the_end_is_let_through_even_where_it_was_not_allowed_and_is_penalised():  # STOP-3
    wanted = request(
        prompt=(3,),
        eos=3,
        min_tokens=2,
        stop_token_ids=[7],
        allowed_token_ids=[7],
        repetition_penalty=1.3,
    )
    after = edited(wanted, [])
    assert np.isfinite(after[3])
    assert masked(after) == [i for i in range(VOCAB) if i != 3]


def test_a_bias_is_added_and_brings_no_banned_token_back():
    after = edited(request(logit_bias={2: 1.5, 4: -100.0, 5: 100.0}, bad_words=((5,),)))
    assert after[[2, 4, 5]].tolist() == [1.5, -100.0, -np.inf]


def test_a_row_set_anew_is_joined_anew():
    edits = LogitEdits(vocab_size=VOCAB, device=torch.device("cpu"))
    history = History(torch.zeros(1, 4, dtype=torch.int32), torch.tensor([0]), torch.tensor([2]), 2)
    rows = np.zeros(1, np.int32)
    for wanted, expected in ((request(logit_bias={1: 2.0}), 2.0), (request(), 0.0)):
        edits.set_row(0, row_edits(wanted))
        logits = torch.zeros(1, VOCAB)
        edits.apply(logits, rows, history)
        assert logits[0, 1] == expected


token = st.integers(0, VOCAB - 1)
words = st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)
biases = st.none() | st.dictionaries(token, st.sampled_from([-100.0, -1.5, 0.5, 30.0]), max_size=3)
wishes = st.builds(
    request,
    prompt=st.lists(token, min_size=1, max_size=6).map(tuple),
    eos=st.sampled_from([-1, 0, 3]),
    bad_words=words,
    allowed_token_ids=st.none() | st.lists(token, min_size=1, max_size=4),
    min_tokens=st.sampled_from([0, 2, 5]),
    stop_token_ids=st.lists(token, max_size=2),
    logit_bias=biases,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    frequency_penalty=st.sampled_from([0.0, -2.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
)
outputs = st.lists(st.integers(0, 5), max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(wishes, outputs), min_size=1, max_size=NUM_ROWS), st.integers(0, 2**32))
def test_a_batch_is_edited_as_each_sequence_alone_would_be(asked, seed):
    logits = np.random.default_rng(seed).normal(size=(len(asked), VOCAB)).astype(np.float32) * 4

    actual = apply(torch.from_numpy(logits), asked)

    for i, (wanted, produced) in enumerate(asked):
        expected = reference(wanted, produced, logits[i])
        np.testing.assert_allclose(actual[i], expected, rtol=1e-5, atol=1e-4)


def test_penalties_in_pieces_are_those_of_the_whole(monkeypatch):
    logits = torch.randn(NUM_ROWS, VOCAB, generator=torch.Generator().manual_seed(1))
    asked = [(request(frequency_penalty=0.3 * i), [i, i, 7]) for i in range(NUM_ROWS)]
    whole = apply(logits, asked)
    monkeypatch.setattr(logits_module, "_MAX_COUNTS", 2 * VOCAB)
    np.testing.assert_array_equal(apply(logits, asked), whole)


@pytest.mark.parametrize("length", [1, 2])
def test_a_bad_word_never_matches_before_the_start(length):
    wanted = request(prompt=(5,), bad_words=((5, 5, 5, 9)[-length - 1 :],))
    assert masked(edited(wanted, [])) == []
