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
from pagedcore.execution.ops import StepBatch
from pagedcore.step import Int64, StepPlan


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


def to_device(plan: StepPlan, state: DeviceState, block_size: int) -> DeviceBatch:
    """Upload a plan; nothing waits for the device."""
    counts = plan.num_scheduled.astype(np.int64)
    computed = plan.num_computed.astype(np.int64)
    ends = np.cumsum(counts)
    num_seqs, num_tokens = len(counts), int(ends[-1])
    context_len = computed + counts
    drawing = np.flatnonzero(plan.samples)
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
    packed = upload(np.concatenate(parts, dtype=np.int64), state.tokens.device)
    sizes = [len(part) for part in parts]
    positions, row_of, rows, query_start, context, last, drawing_rows, known = packed.split(sizes)
    batch = StepBatch(
        positions=positions,
        rows=rows.int(),
        query_start=query_start.int(),
        context_len=context.int(),
        block_tables=state.block_tables,
        slots=slots_of(state.block_tables, row_of, positions, block_size),
        num_single=plan.num_single,
        max_query_len=int(counts.max()) if num_seqs else 0,
        max_context_len=int(context_len.max()) if num_seqs else 0,
    )
    token_ids = state.tokens[row_of, positions].long()
    return DeviceBatch(token_ids, batch, drawing, last, drawing_rows, known)


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
