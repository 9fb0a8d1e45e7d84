"""Attention in both directions, over sequences of any lengths in one step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.execution.encoder_attention import encode_attention, rotate
from pagedcore.execution.ops import RopeTable, StepBatch

H, D = 2, 8


def make_batch(lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return StepBatch(
        positions=torch.cat([torch.arange(n) for n in lengths]),
        rows=torch.arange(len(lengths), dtype=torch.int32),
        query_start=starts,
        context_len=torch.tensor(lengths, dtype=torch.int32),
        block_tables=torch.zeros(0, len(lengths), 1, dtype=torch.int32),
        slots=torch.zeros(0, sum(lengths), dtype=torch.int64),
        num_single=0,
        max_query_len=max(lengths),
        max_context_len=max(lengths),
        shared={},
    )


def naive(qkv, lengths, scale, window):
    """Each sequence by itself, with all scores written out."""
    out = []
    for part in qkv.view(len(qkv), 3, H, D).split(lengths):
        query, key, value = part.permute(1, 2, 0, 3)
        scores = query @ key.mT * scale
        if window is not None:
            place = torch.arange(len(part))
            scores[:, (place[:, None] - place).abs() > window] = -torch.inf
        out.append((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))
    return torch.cat(out)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_each_sequence_sees_all_of_itself_and_nothing_else(lengths, window):
    qkv = torch.randn(sum(lengths), 3 * H * D, generator=torch.Generator().manual_seed(0))
    batch = make_batch(lengths)
    for _ in range(2):  # the second layer shares what the first has found out
        out = encode_attention(qkv, H, 0.3, batch, window)
        assert (out - naive(qkv, lengths, 0.3, window)).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 3])
def test_numbers_that_are_not_finite_stay_in_their_sequence(window):
    lengths = [5, 20, 7, 18]
    qkv = torch.randn(sum(lengths), 3 * H * D)
    qkv[26] = torch.nan  # in the third
    out = encode_attention(qkv, H, 0.3, make_batch(lengths), window)
    good = torch.ones(len(qkv), dtype=torch.bool)
    good[25:32] = False
    expected = naive(qkv, lengths, 0.3, window)
    assert (out[good] - expected[good]).abs().max() < 1e-5
    assert out[26].isnan().all()


def test_only_queries_and_keys_turn():
    lengths = [4, 3]
    angles = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.5, 0.2, 0.1]))
    rope = RopeTable(torch.cat([angles.cos(), angles.sin()], 1))
    qkv = torch.randn(7, 3 * H * D)
    before = qkv.clone().view(7, 3, H, D)
    batch = make_batch(lengths)
    rotate(qkv, H, rope, batch)
    after = qkv.view(7, 3, H, D)
    assert torch.equal(after[:, 2], before[:, 2])
    assert torch.equal(after[[0, 4], :2], before[[0, 4], :2])  # position 0 turns by nothing
    left, right = before[5, 0, 1].chunk(2)
    cos, sin = angles[1].cos(), angles[1].sin()
    expected = torch.cat([left * cos - right * sin, right * cos + left * sin])
    assert (after[5, 0, 1] - expected).abs().max() < 1e-6
