"""What the device keeps of each row, and a plan as tensors."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagedcore.execution.batch import (
    pack,
    pad_sequences,
    pad_tokens,
    profile_batch,
    to_device,
    unpack,
)
from pagedcore.execution.device_state import DeviceState
from pagedcore.execution.graphs import bucket_sizes
from pagedcore.request import Request
from pagedcore.step import Admission, StepPlan

BLOCK = 4


def make_state(num_rows=6, num_groups=2):
    return DeviceState(
        num_rows=num_rows,
        max_model_len=32,
        num_groups=num_groups,
        max_blocks=9,
        device=torch.device("cpu"),
    )


def admission(row, tokens):
    ids = np.array(tokens, np.int32)
    return Admission(row, Request(id=row, prompt_token_ids=ids), ids, seed=0)


def test_rows_that_start_together_get_their_own_tokens():
    state = make_state()
    state.admit([admission(3, [5, 6, 7]), admission(0, [9]), admission(5, [1, 2])])
    assert state.tokens[3, :3].tolist() == [5, 6, 7]
    assert state.tokens[0, 0] == 9
    assert state.tokens[5, :2].tolist() == [1, 2]


def test_table_updates_go_to_their_group_row_and_entry():
    state = make_state()
    state.update_tables(np.array([[0, 3, 1, 40], [1, 3, 1, 41], [1, 0, 8, 42]], np.int32))
    assert state.block_tables[0, 3].tolist() == [0, 40, 0, 0, 0, 0, 0, 0, 0]
    assert state.block_tables[1, 3, 1] == 41
    assert state.block_tables[1, 0, 8] == 42
    assert state.block_tables.count_nonzero() == 3


@given(st.data())
def test_a_plan_becomes_the_tokens_positions_and_slots_it_stands_for(data):
    state = make_state()
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rows = rng.permutation(6)[: data.draw(st.integers(1, 6))].astype(np.int32)
    state.tokens.copy_(torch.from_numpy(rng.integers(0, 99, state.tokens.shape)))
    state.block_tables.copy_(torch.from_numpy(rng.integers(1, 50, state.block_tables.shape)))
    num_single = data.draw(st.integers(0, len(rows)))
    computed = rng.integers(0, 16, len(rows)).astype(np.int32)
    counts = np.where(np.arange(len(rows)) < num_single, 1, rng.integers(1, 12, len(rows)))
    samples = rng.random(len(rows)) < 0.5
    plan = StepPlan(rows, computed, counts.astype(np.int32), samples, num_single)

    step = to_device(plan, np.flatnonzero(plan.samples), state, BLOCK)

    token = 0
    for i, row in enumerate(rows.tolist()):
        assert step.batch.query_start[i] == token
        assert step.batch.context_len[i] == computed[i] + counts[i]
        for position in range(computed[i], computed[i] + counts[i]):
            assert step.token_ids[token] == state.tokens[row, position]
            assert step.batch.positions[token] == position
            for group in range(2):
                block = int(state.block_tables[group, row, position // BLOCK])
                assert step.batch.slots[group, token] == block * BLOCK + position % BLOCK
            token += 1
    assert step.batch.query_start[-1] == token == len(step.token_ids)
    assert step.drawing.tolist() == np.flatnonzero(samples).tolist()
    ends = np.cumsum(counts) - 1
    assert step.last_token.tolist() == ends[samples].tolist()
    assert step.rows.tolist() == rows[samples].tolist()
    assert step.num_known.tolist() == (computed + counts)[samples].tolist()
    assert step.batch.max_query_len == counts.max()
    assert step.batch.max_context_len == (computed + counts).max()


def unpacked(packed, state, num_single):
    return unpack(
        torch.from_numpy(packed.values),
        packed.sizes,
        state,
        BLOCK,
        drawing=np.arange(packed.num_draws),
        num_single=num_single,
        max_query_len=32,
        max_context_len=32,
    )


@given(st.data())
def test_padding_moves_no_token_of_anybody_and_adds_those_of_nobody(data):
    state = make_state(num_rows=9)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    num_single, num_long = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 4))
    seqs = num_single + num_long
    rows = rng.permutation(9)[:seqs].astype(np.int32)
    computed = rng.integers(0, 9, seqs).astype(np.int32)
    counts = np.where(np.arange(seqs) < num_single, 1, rng.integers(2, 6, seqs)).astype(np.int32)
    state.block_tables[:, :9].copy_(torch.randint(1, 50, (2, 9, 9)))
    plan = StepPlan(rows, computed, counts, np.ones(seqs, np.bool_), num_single)

    plain = unpacked(pack(plan, np.arange(seqs)), state, num_single)
    padded = pad_sequences(plan, 5, 4, state.padding_row)
    wide = unpacked(pad_tokens(pack(padded, np.arange(9)), 32, state.padding_row), state, 5)

    assert len(wide.token_ids) == 32
    assert wide.batch.num_single == 5
    tokens = plan.num_tokens
    kept = [*range(num_single), *range(5, 5 + tokens - num_single)]  # where their tokens went
    others = sorted({*range(32)} - {*kept})
    assert torch.equal(wide.batch.positions[kept], plain.batch.positions)
    assert torch.equal(wide.batch.slots[:, kept], plain.batch.slots)
    assert not (wide.batch.slots[:, others] // BLOCK).any()  # the null block
    members = [*range(num_single), *range(5, 5 + num_long)]
    nobody = sorted({*range(9)} - {*members})
    for name in ("rows", "context_len"):
        values, wanted = getattr(wide.batch, name), getattr(plain.batch, name)
        assert torch.equal(values[members], wanted)
    assert wide.batch.rows[nobody].tolist() == [state.padding_row] * len(nobody)
    lengths = wide.batch.query_start.diff()
    assert torch.equal(lengths[members], plain.batch.query_start.diff())
    assert lengths[nobody].tolist() == [int(i < 5) for i in nobody]
    assert [kept.index(i) for i in wide.last_token[members].tolist()] == plain.last_token.tolist()
    assert torch.equal(wide.num_known[members], plain.num_known)
    assert wide.rows[nobody].tolist() == [state.padding_row] * len(nobody)
    assert (wide.num_known[nobody] == 1).all()


def test_the_largest_step_is_cut_into_sequences_that_are_allowed():
    tables = torch.zeros(1, 1, 3, dtype=torch.int32)
    token_ids, batch = profile_batch(25, 10, tables, torch.device("cpu"))
    assert len(token_ids) == 25
    assert batch.query_start.tolist() == [0, 10, 20, 25]
    assert batch.context_len.tolist() == [10, 10, 5]
    assert batch.positions.tolist() == [*range(10), *range(10), *range(5)]


@given(st.integers(1, 1024))
def test_every_batch_has_a_bucket_that_wastes_at_most_half(max_num_seqs):
    sizes = bucket_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for num_seqs in range(1, max_num_seqs + 1):
        bucket = next(size for size in sizes if size >= num_seqs)
        assert bucket < max(2, 2 * num_seqs)
