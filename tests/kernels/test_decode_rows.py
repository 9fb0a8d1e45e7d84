"""The kernels around a decode step against plain torch."""

import pytest
import torch

from pagedcore.execution.torch_ops import TorchOps
from pagedcore_kernels import decode_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def state(num_sequences, num_rows, seed):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 999, (num_rows, 40), generator=rng, dtype=torch.int32)
    tables = torch.randint(0, 99, (2, num_rows, 5), generator=rng, dtype=torch.int32)
    rows = torch.randperm(num_rows - 1, generator=rng)[:num_sequences]
    rows[num_sequences // 2 :: 3] = num_rows - 1  # padding
    positions = torch.randint(0, 38, (num_sequences,), generator=rng)
    return [tensor.to(DEVICE) for tensor in (tokens, tables, rows, positions)]


@pytest.mark.parametrize(("num_sequences", "num_rows"), [(1, 2), (7, 12), (128, 130), (300, 333)])
@pytest.mark.parametrize("block_size", [8, 16])
def test_inputs_are_those_of_plain_torch(num_sequences, num_rows, block_size):
    tokens, tables, rows, positions = state(num_sequences, num_rows, block_size)
    want = TorchOps(DEVICE).decode_inputs(tokens, tables, rows, positions, block_size)
    got = decode_rows.decode_inputs(tokens, tables, rows, positions, block_size)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("num_sequences", "num_rows"), [(1, 2), (7, 12), (128, 130), (300, 333)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_advance_as_in_plain_torch(num_sequences, num_rows, dtype):
    tokens, _, rows, positions = state(num_sequences, num_rows, num_rows)
    logits = torch.randn(num_sequences, 70, device=DEVICE).to(dtype)[:, :57]  # rows have a stride
    drawn = torch.randint(0, 57, (num_sequences,), device=DEVICE)
    for i, bad in enumerate((float("nan"), float("inf"), -float("inf"))):
        logits[i % num_sequences, drawn[i % num_sequences]] = bad
    real = rows != num_rows - 1
    ours, theirs = [(tokens.clone(), positions.clone()) for _ in range(2)]
    want = TorchOps(DEVICE).advance_rows(drawn, logits, theirs[0], rows, theirs[1])
    got = decode_rows.advance_rows(drawn, logits, ours[0], rows, ours[1])
    assert torch.equal(got, want)
    assert (want < 0).any()
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[1], positions + real)
    assert torch.equal(ours[0][:-1], theirs[0][:-1])  # many write to the row of padding
