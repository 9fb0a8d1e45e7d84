"""Draws as the executor asks for them: rows that start, steps, bad rows, log-probabilities."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.execution import torch_sampling
from pagedcore.execution.sampler import Drawn, Sampler
from pagedcore.request import Request, SamplingParams
from pagedcore.step import Admission

VOCAB = 37
NUM_ROWS = 8


class TorchSampling:
    """The one operation that draws need, counted."""

    def __init__(self):
        self.num_calls = 0

    def sample(self, logits, sampling):
        self.num_calls += 1
        return torch_sampling.sample(logits, sampling)


class Draws:
    """A sampler with its token table, and logits that depend on nothing but the seed."""

    def __init__(self, logprobs_mode="raw_logprobs", vocab_size=VOCAB):
        self.ops = TorchSampling()
        self.sampler = Sampler(
            self.ops,
            num_rows=NUM_ROWS,
            vocab_size=vocab_size,
            device=torch.device("cpu"),
            logprobs_mode=logprobs_mode,
        )
        self.table = torch.zeros(NUM_ROWS, 64, dtype=torch.int32)
        self.num_known = np.zeros(NUM_ROWS, np.int64)
        self.ids = itertools.count()

    def admit(self, row, prompt=(1, 2, 3), seed=0, eos=-1, bad_words=(), outputs=(), **params):
        known = np.array([*prompt, *outputs], np.int32)
        request = Request(
            id=next(self.ids),
            prompt_token_ids=np.array(prompt, np.int32),
            params=SamplingParams(max_tokens=32, **params),
            eos_token_id=eos,
            bad_words_token_ids=bad_words,
        )
        self.table[row, : len(known)] = torch.from_numpy(known)
        self.num_known[row] = len(known)
        self.sampler.admit([Admission(row, request, known, seed)])

    def draw(self, logits, rows) -> Drawn:
        rows = np.asarray(rows, np.int32)
        known = torch.from_numpy(self.num_known[rows])
        longest = int(known.max())
        on_device = torch.from_numpy(rows).long()
        return self.sampler.draw(logits, rows, on_device, known, self.table, longest)

    def push(self, row, token):
        """What the executor does with a drawn token."""
        self.table[row, self.num_known[row]] = token
        self.num_known[row] += 1


def some_logits(num, seed=0, vocab_size=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, vocab_size, generator=generator) * 3


def test_greedy_takes_the_first_of_the_largest():
    draws = Draws()
    draws.admit(2, temperature=0.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, [5, 9]] = 4.0

    drawn = draws.draw(logits, [2])

    assert drawn.tokens.tolist() == [5]
    assert drawn.tokens.dtype == torch.int64
    assert not drawn.bad.any()
    assert drawn.logprobs is None


def test_a_row_that_starts_again_forgets_what_it_asked_for_before():
    draws = Draws()
    draws.admit(0, temperature=0.0, allowed_token_ids=[7], logprobs=2)
    logits = some_logits(1)
    assert draws.draw(logits, [0]).tokens.tolist() == [7]

    draws.admit(0, temperature=0.0)

    drawn = draws.draw(logits, [0])
    assert drawn.tokens.tolist() == [int(logits.argmax())]
    assert drawn.logprobs is None
    assert draws.sampler.is_plain(np.array([0]))


def test_a_draw_with_the_same_rows_object_sees_rows_that_started_meanwhile():
    draws = Draws()
    draws.admit(0, temperature=0.0)
    logits = some_logits(1)
    rows, on_device = np.array([0], np.int32), torch.tensor([0])
    known = torch.tensor([3])
    draws.sampler.draw(logits, rows, on_device, known, draws.table, 3)

    draws.admit(0, temperature=0.0, allowed_token_ids=[4])

    drawn = draws.sampler.draw(logits, rows, on_device, known, draws.table, 3)
    assert drawn.tokens.tolist() == [4]


def test_sequences_of_all_kinds_share_a_draw():
    draws = Draws()
    draws.admit(0, temperature=0.0)
    draws.admit(1, temperature=1.0, top_k=1)
    draws.admit(2, temperature=0.0, logit_bias={8: 100.0})
    draws.admit(3, temperature=5.0, top_p=1e-6)
    logits = some_logits(4)

    tokens = draws.draw(logits, [0, 1, 2, 3]).tokens

    largest = logits.argmax(-1).tolist()
    assert tokens.tolist() == [largest[0], largest[1], 8, largest[3]]


def test_logits_are_never_changed():
    for dtype in (torch.float32, torch.bfloat16):
        draws = Draws("processed_logprobs")
        draws.admit(0, repetition_penalty=2.0, logit_bias={1: 5.0}, logprobs=3, temperature=0.3)
        logits = some_logits(1).to(dtype)
        before = logits.clone()
        draws.draw(logits, [0])
        assert torch.equal(logits, before)


def test_edits_apply_to_every_step_and_read_tokens_from_the_table():
    draws = Draws()
    draws.admit(0, prompt=(1, 5), temperature=0.0, bad_words=((5, 6),), eos=3, min_tokens=3)
    likes_eos_then_6_then_5 = torch.zeros(1, VOCAB)
    likes_eos_then_6_then_5[0, [3, 6, 5]] = torch.tensor([9.0, 8.0, 7.0])
    likes_5 = torch.zeros(1, VOCAB)
    likes_5[0, 5] = 9.0

    out = []
    for logits in (likes_5, likes_eos_then_6_then_5, likes_eos_then_6_then_5):
        out.append(int(draws.draw(logits, [0]).tokens))
        draws.push(0, out[-1])
    assert out == [5, 5, 5]  # 6 may not follow 5, and the end has to wait

    assert draws.draw(likes_eos_then_6_then_5, [0]).tokens.tolist() == [3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), -float("inf")])
def test_rows_without_a_finite_logit_are_flagged_and_the_others_are_not(temperature, broken):
    draws = Draws()
    for row in range(3):
        draws.admit(row, temperature=temperature)
    logits = some_logits(3)
    logits[1] = broken

    drawn = draws.draw(logits, [0, 1, 2])

    assert drawn.bad.tolist() == [False, True, False]
    assert ((drawn.tokens >= 0) & (drawn.tokens < VOCAB)).all()


def test_a_sequence_whose_only_allowed_token_is_banned_is_flagged():
    draws = Draws()
    draws.admit(0, temperature=0.0, allowed_token_ids=[7], bad_words=((7,),))
    assert draws.draw(some_logits(1), [0]).bad.tolist() == [True]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_nan_is_enough_to_flag_a_row(temperature):
    draws = Draws()
    draws.admit(0, temperature=temperature)
    logits = some_logits(1)
    logits[0, 11] = float("nan")
    assert draws.draw(logits, [0]).bad.tolist() == [True]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    row=st.integers(0, NUM_ROWS - 1),
    mates=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), max_size=NUM_ROWS - 1),
)
def test_a_seeded_sequence_draws_the_same_tokens_in_any_row_and_company(seed, row, mates):
    logits = some_logits(12, seed=1)

    def outputs(row, mates):
        draws = Draws()
        draws.admit(row, seed=seed, temperature=0.8, top_p=0.9)
        others = [r for r in range(NUM_ROWS) if r != row][: len(mates)]
        for other, temperature in zip(others, mates, strict=True):
            draws.admit(other, seed=other, temperature=temperature, prompt=(9,) * (other + 1))
        order = sorted([*others, row])
        out = []
        for step in range(4):
            batch = some_logits(len(order), seed=100 + step)
            batch[order.index(row)] = logits[step]
            tokens = draws.draw(batch, order).tokens
            for r, token in zip(order, tokens.tolist(), strict=True):
                draws.push(r, token)
            out.append(int(tokens[order.index(row)]))
        return out

    assert outputs(row, mates) == outputs(0, [])


def test_a_sequence_goes_on_after_a_preemption_as_if_it_had_not_been_away():
    logits = some_logits(6, seed=2)

    def run(preempted_after):
        draws = Draws()
        draws.admit(1, seed=5, temperature=1.0, frequency_penalty=1.0)
        row, out = 1, []
        for step in range(6):
            if step == preempted_after:
                row = 4
                draws.admit(row, seed=5, outputs=out, temperature=1.0, frequency_penalty=1.0)
            token = int(draws.draw(logits[step : step + 1], [row]).tokens)
            draws.push(row, token)
            out.append(token)
        return out

    assert run(3) == run(None)


def test_different_seeds_draw_different_tokens():
    draws = Draws()
    for row in range(NUM_ROWS):
        draws.admit(row, seed=row, temperature=1.0)
    tokens = draws.draw(torch.zeros(NUM_ROWS, VOCAB), range(NUM_ROWS)).tokens
    assert len(set(tokens.tolist())) > NUM_ROWS // 2


def test_a_greedy_draw_costs_one_operation_and_no_random_number(monkeypatch):
    draws = Draws()
    draws.admit(0, temperature=0.0)
    monkeypatch.setattr("pagedcore.execution.sampler.uniform", None)
    draws.draw(some_logits(1), [0])
    assert draws.ops.num_calls == 1


def test_a_top_k_above_the_vocabulary_is_off():
    draws = Draws()
    draws.admit(0, temperature=1.0, top_k=2**40)
    draws.admit(1, temperature=1.0)
    logits = some_logits(1).expand(2, -1)
    tokens = draws.draw(logits, [0, 1]).tokens
    assert tokens[0] == tokens[1]


def test_plain_rows_want_neither_edits_nor_logprobs():
    draws = Draws()
    draws.admit(0, temperature=0.7)
    draws.admit(1, temperature=0.7, logprobs=0)
    draws.admit(2, temperature=0.7, presence_penalty=0.5)
    assert draws.sampler.is_plain(np.array([0]))
    assert not draws.sampler.is_plain(np.array([0, 1]))
    assert not draws.sampler.is_plain(np.array([2, 0]))


def test_prompt_logprobs_are_wanted_by_those_who_asked():
    draws = Draws()
    draws.admit(0)
    draws.admit(1, prompt_logprobs=0)
    draws.admit(2, prompt_logprobs=-1)
    wants = draws.sampler.wants_prompt_logprobs
    assert [wants(0), wants(1), wants(2)] == [None, 0, VOCAB]
