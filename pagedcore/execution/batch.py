"""A `StepPlan` as tensors: the one crossing from bookkeeping to the device.

    T tokens    S sequences    K sequences that draw a token    G cache groups

What the host knows is laid end to end in one int64 array and uploaded at once; token ids and slots
are looked up on the device, in the state that it keeps of each row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedcore.execution.device_state import DeviceState
from pagedcore.execution.logits import upload
from pagedcore.execution.lora_ops import AdapterStep
from pagedcore.execution.ops import StepBatch
from pagedcore.step import Int32, Int64, StepPlan


@dataclass(slots=True)
class DeviceBatch:
    """One step, ready to run."""

    token_ids: Tensor
    """[T] int64"""

    batch: StepBatch
    """Where the tokens stand."""

    drawing: Int64
    """[K] Sequences that draw, by index in the plan; on the host."""

    last_token: Tensor
    """[K] int64: index of the last token of each sequence that draws."""

    rows: Tensor
    """[K] int64: their rows."""

    num_known: Tensor
    """[K] int64: position that each drawn token takes."""


def slots_of(tables: Tensor, rows: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Cache slots [G, T] int64 of positions [T] in rows [T], by tables [G, R, M] int32."""
    block = tables[:, rows, positions // block_size].long()
    return block * block_size + positions % block_size


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """What the host knows of a step, laid end to end in one array."""

    values: Int64
    """Positions and rows of T tokens; rows, query starts and context lengths of S sequences; last
    token, row and known tokens of K draws."""

    num_tokens: int
    num_seqs: int
    num_draws: int

    @property
    def sizes(self) -> list[int]:
        """Of the parts, in order."""
        tokens, seqs, draws = self.num_tokens, self.num_seqs, self.num_draws
        return [tokens, tokens, seqs, seqs + 1, seqs, draws, draws, draws]


def pack(plan: StepPlan, drawing: Int64) -> PackedPlan:
    """The arrays of a plan of which the sequences `drawing` [K] draw a token."""
    counts = plan.num_scheduled.astype(np.int64)
    computed = plan.num_computed.astype(np.int64)
    ends = np.cumsum(counts)
    num_tokens = int(counts.sum())
    context_len = computed + counts
    parts = (
        np.repeat(computed - ends + counts, counts) + np.arange(num_tokens),
        np.repeat(plan.rows.astype(np.int64), counts),
        plan.rows,
        np.concatenate(([0], ends)),
        context_len,
        ends[drawing] - 1,
        plan.rows[drawing],
        context_len[drawing],
    )
    values = np.concatenate(parts, dtype=np.int64)
    return PackedPlan(values, num_tokens, len(counts), len(drawing))


def pad_sequences(plan: StepPlan, num_single: int, num_extended: int, padding_row: int) -> StepPlan:
    """The same with sequences of the padding row behind those of one token, and behind the others.

    The former run one token, in the null block, and the latter none.
    """
    wanted = (num_single - plan.num_single, num_extended - (len(plan.rows) - plan.num_single))

    def padded(values: Int32, single: int, extended: int) -> Int32:
        parts = np.split(values, [plan.num_single])
        fills = [
            np.full(n, fill, np.int32) for n, fill in zip(wanted, (single, extended), strict=True)
        ]
        return np.concatenate((parts[0], fills[0], parts[1], fills[1]))

    return StepPlan(
        rows=padded(plan.rows, padding_row, padding_row),
        num_computed=padded(plan.num_computed, 0, 1),
        num_scheduled=padded(plan.num_scheduled, 1, 0),
        samples=np.ones(num_single + num_extended, np.bool_),
        num_single=num_single,
    )


def pad_tokens(packed: PackedPlan, num_tokens: int, padding_row: int) -> PackedPlan:
    """The same with tokens of the padding row behind, which belong to no sequence."""
    missing, size = num_tokens - packed.num_tokens, packed.num_tokens
    positions, rows, rest = np.split(packed.values, [size, 2 * size])
    fills = [np.full(missing, fill, np.int64) for fill in (0, padding_row)]
    values = np.concatenate((positions, fills[0], rows, fills[1], rest))
    return PackedPlan(values, num_tokens, packed.num_seqs, packed.num_draws)


def unpack(
    values: Tensor,
    sizes: list[int],
    state: DeviceState,
    block_size: int,
    *,
    drawing: Int64,
    num_single: int,
    max_query_len: int,
    max_context_len: int,
    has_adapters: bool = False,
) -> DeviceBatch:
    """A packed plan's values [N] int64 on the device as a step's tensors."""
    parts = torch.split(values, sizes)
    positions, row_of, rows, query_start, context, last, drawing_rows, known = parts
    batch = StepBatch(
        positions=positions,
        rows=rows.int(),
        query_start=query_start.int(),
        context_len=context.int(),
        block_tables=state.block_tables,
        slots=slots_of(state.block_tables, row_of, positions, block_size),
        num_single=num_single,
        max_query_len=max_query_len,
        max_context_len=max_context_len,
        adapters=adapters_of(state, row_of, num_single) if has_adapters else None,
    )
    token_ids = state.tokens[row_of, positions].long()
    return DeviceBatch(token_ids, batch, drawing, last, drawing_rows, known)


def adapters_of(state: DeviceState, rows: Tensor, num_single: int) -> AdapterStep:
    """The adapters of tokens in rows [T] int64."""
    assert state.adapter_slots is not None, "no room was made for adapters"
    return AdapterStep(state.adapter_slots[rows], num_single)


def to_device(
    plan: StepPlan,
    drawing: Int64,
    state: DeviceState,
    block_size: int,
    *,
    has_adapters: bool = False,
) -> DeviceBatch:
    """Upload a plan of which `drawing` [K] draw a token; nothing waits for the device."""
    packed = pack(plan, drawing)
    return unpack(
        upload(packed.values, state.tokens.device),
        packed.sizes,
        state,
        block_size,
        drawing=drawing,
        num_single=plan.num_single,
        max_query_len=int(plan.num_scheduled.max()),
        max_context_len=int((plan.num_computed + plan.num_scheduled).max()),
        has_adapters=has_adapters,
    )


def profile_batch(
    num_tokens: int, longest: int, tables: Tensor, device: torch.device
) -> tuple[Tensor, StepBatch]:
    """Token ids and a batch of the largest step, whose keys all go to the null block."""
    counts = [longest] * (num_tokens // longest)
    if num_tokens % longest:
        counts.append(num_tokens % longest)
    query_start = torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int32, device=device)
    lengths = torch.tensor(counts, dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in counts])
    batch = StepBatch(
        positions=positions,
        rows=torch.zeros(len(counts), dtype=torch.int32, device=device),
        query_start=query_start,
        context_len=lengths,
        block_tables=tables,
        slots=torch.zeros(len(tables), num_tokens, dtype=torch.int64, device=device),
        num_single=0,
        max_query_len=max(counts),
        max_context_len=max(counts),
    )
    return torch.zeros(num_tokens, dtype=torch.int64, device=device), batch
