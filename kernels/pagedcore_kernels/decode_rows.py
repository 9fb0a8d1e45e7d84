"""What a decode step begins and ends with: inputs out of the rows' state, and the state moved on.

    S sequences   R rows, the last of which is padding   L positions per row   V vocabulary
    G cache groups   M table entries per row   B positions per block

    tokens            [R, L] int32       known tokens by row; the new ones are written
    block_tables      [G, R, M] int32    contiguous
    rows, positions   [S] int64          contiguous; positions are advanced
    token_ids         [S] int64          tokens[row, position]
    rows_int32        [S] int32
    context_len       [S] int32          position + 1; 0 for padding
    slots             [G, S] int64       block * B + position % B
    drawn             [S] int64          new tokens, of logits [S, V] with any row stride
    marked            [S] int64          drawn, or -1 - drawn where its logit is not finite

The grid is (cdiv(S, BLOCK), G) and (cdiv(S, BLOCK),): a launch each, in place of a dozen of plain
torch, which at small batches are as long as a layer. They move some 60 bytes per sequence, in
accesses that latency limits.

`TorchOps.decode_inputs` and `TorchOps.advance_rows` are the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@triton.jit
def _decode_inputs_kernel(
    tokens,
    block_tables,
    rows,
    positions,
    token_ids,
    rows_int32,
    context_len,
    slots,
    num_sequences,
    num_rows,
    tokens_stride,
    num_entries,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = sequence < num_sequences
    group = tl.program_id(1)
    row = tl.load(rows + sequence, exists, 0)
    position = tl.load(positions + sequence, exists, 0)
    entry = (group * num_rows + row) * num_entries + position // B
    block = tl.load(block_tables + entry, exists, 0).to(tl.int64)
    tl.store(slots + group * num_sequences + sequence, block * B + position % B, exists)
    if group == 0:
        token = tl.load(tokens + row * tokens_stride + position, exists, 0)
        tl.store(token_ids + sequence, token.to(tl.int64), exists)
        tl.store(rows_int32 + sequence, row.to(tl.int32), exists)
        length = tl.where(row == num_rows - 1, 0, position + 1)
        tl.store(context_len + sequence, length.to(tl.int32), exists)


@triton.jit
def _advance_rows_kernel(
    drawn,
    logits,
    tokens,
    rows,
    positions,
    marked,
    num_sequences,
    num_rows,
    logits_stride,
    tokens_stride,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = sequence < num_sequences
    row = tl.load(rows + sequence, exists, 0)
    position = tl.load(positions + sequence, exists, 0)
    token = tl.load(drawn + sequence, exists, 0)
    logit = tl.load(logits + sequence.to(tl.int64) * logits_stride + token, exists, 0.0)
    logit = logit.to(tl.float32)
    is_good = tl.abs(logit) < float("inf")  # false for NaN too
    tl.store(marked + sequence, tl.where(is_good, token, -1 - token), exists)
    tl.store(tokens + row * tokens_stride + position + 1, token.to(tl.int32), exists)
    moves = tl.where(row == num_rows - 1, 0, 1)
    tl.store(positions + sequence, position + moves, exists)


def decode_inputs(
    tokens: Tensor, block_tables: Tensor, rows: Tensor, positions: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return token_ids, rows_int32, context_len and slots."""
    num_groups, num_rows, num_entries = block_tables.shape
    num_sequences = len(rows)
    assert tokens.shape[0] == num_rows and tokens.stride(1) == 1 and block_tables.is_contiguous()
    assert rows.is_contiguous() and positions.is_contiguous()
    token_ids = torch.empty_like(rows)
    rows_int32, context_len = torch.empty(
        (2, num_sequences), dtype=torch.int32, device=rows.device
    ).unbind()
    slots = torch.empty((num_groups, num_sequences), dtype=torch.int64, device=rows.device)
    if num_sequences:
        _decode_inputs_kernel[(triton.cdiv(num_sequences, BLOCK), num_groups)](
            tokens,
            block_tables,
            rows,
            positions,
            token_ids,
            rows_int32,
            context_len,
            slots,
            num_sequences,
            num_rows,
            tokens.stride(0),
            num_entries,
            B=block_size,
            BLOCK=BLOCK,
        )
    return token_ids, rows_int32, context_len, slots


def advance_rows(
    drawn: Tensor, logits: Tensor, tokens: Tensor, rows: Tensor, positions: Tensor
) -> Tensor:
    """Write the tokens away, advance the positions and return marked."""
    num_sequences = len(rows)
    assert logits.stride(1) == 1 and tokens.stride(1) == 1
    assert rows.is_contiguous() and positions.is_contiguous() and drawn.is_contiguous()
    marked = torch.empty_like(drawn)
    if num_sequences:
        _advance_rows_kernel[(triton.cdiv(num_sequences, BLOCK),)](
            drawn,
            logits,
            tokens,
            rows,
            positions,
            marked,
            num_sequences,
            len(tokens),
            logits.stride(0),
            tokens.stride(0),
            BLOCK=BLOCK,
        )
    return marked
