"""Steps of made-up sequences, for operations that are called without a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pagedcore.execution.ops import StepBatch


@dataclass(slots=True)
class DrawnStep:
    """A step, and the one before it that ran all that its sequences have of a past."""

    batch: StepBatch
    past_batch: StepBatch
    past: list[int]
    """Tokens of each sequence that come before the step."""

    num_tokens: int
    num_blocks: int
    block_size: int


def draw_step(
    generator: torch.Generator, lengths: Sequence[tuple[int, int]], block_size: int = 16
) -> DrawnStep:
    """A step of sequences that run so many tokens, of so many in all; single ones come first.

    Their blocks lie scattered in the cache, in random order.
    """
    num_rows = len(lengths)
    max_blocks = max(-(-total // block_size) for _, total in lengths)
    num_blocks = 1 + num_rows * max_blocks
    order = 1 + torch.randperm(num_blocks - 1, generator=generator)
    tables = order.view(1, num_rows, max_blocks).int()
    past = [total - count for count, total in lengths]
    return DrawnStep(
        batch=_batch([(begin, count) for begin, (count, _) in zip(past, lengths, strict=True)],
                     list(range(num_rows)), tables, block_size),
        past_batch=_batch([(0, n) for n in past if n], [i for i, n in enumerate(past) if n],
                          tables, block_size),
        past=past,
        num_tokens=sum(count for count, _ in lengths),
        num_blocks=num_blocks,
        block_size=block_size,
    )  # fmt: skip


def _batch(
    spans: list[tuple[int, int]], rows: list[int], tables: torch.Tensor, block_size: int
) -> StepBatch:
    """A step that runs, of each row, so many positions from one on."""
    counts = [count for _, count in spans]
    positions = torch.cat([torch.arange(start, start + count) for start, count in spans])
    row_of = torch.tensor(rows).repeat_interleave(torch.tensor(counts))
    blocks = tables[:, row_of, positions // block_size].long()
    num_single = next((i for i, count in enumerate(counts) if count != 1), len(counts))
    return StepBatch(
        positions=positions,
        rows=torch.tensor(rows, dtype=torch.int32),
        query_start=torch.tensor([0, *counts]).cumsum(0).int(),
        context_len=torch.tensor([start + count for start, count in spans], dtype=torch.int32),
        block_tables=tables.clone(),
        slots=blocks * block_size + positions % block_size,
        num_single=num_single,
        max_query_len=max(counts),
        max_context_len=max(start + count for start, count in spans),
    )
