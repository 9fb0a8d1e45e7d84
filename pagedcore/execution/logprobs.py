"""Log-probabilities at one position: the token that stands there, and the most likely ones.

    P positions   V vocabulary   K most likely tokens that are kept of each

What a position needs is gathered into one int32 row on the device, [token's value, its rank, K ids,
K values], values as the bits of a float32: one small copy per step, which nothing waits for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedcore.step import Float32, Int32, Int64, TokenLogprobs


@dataclass(slots=True)
class PendingLogprobs:
    """The log-probabilities of one draw, on their way to the host."""

    packed: Tensor
    """[P, 2 + 2K] int32 on the host; valid once the device has finished the draw."""

    index: Int64
    """[P] Which sequences of the draw asked."""

    num_top: list[int]
    """[P] How many of the most likely tokens each of them asked for."""

    def result(self, tokens: Int32) -> dict[int, TokenLogprobs]:
        """By index in the draw; `tokens` [S] are the draw's. Call when the device has finished."""
        entries = unpack(self.packed.numpy(), tokens[self.index], self.num_top)
        return dict(zip(self.index.tolist(), entries, strict=True))


def pack(values: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """Gather what `unpack` needs of values [P, V] float32 and tokens [P] int64: [P, 2 + 2K] int32.

    `num_top` is K. A token's rank is 1 plus the number of tokens above it, so equals share one.
    """
    value = values.gather(1, tokens[:, None])
    rank = (values > value).sum(-1, keepdim=True, dtype=torch.int32) + 1
    top = values.topk(num_top, dim=-1)
    bits = (value.view(torch.int32), rank, top.indices.int(), top.values.view(torch.int32))
    return torch.cat(bits, dim=1)


def unpack(packed: Int32, tokens: Int32, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """What `pack` gathered for tokens [P], cut to the first `num_top[i]` of position i.

    The token comes first and is not repeated, so there are k or k + 1 entries (SAMPLE-9).
    """
    width = (packed.shape[1] - 2) // 2
    ids = packed[:, 2 : 2 + width]
    values: Float32 = np.ascontiguousarray(packed[:, 2 + width :]).view(np.float32)
    value: Float32 = np.ascontiguousarray(packed[:, :1]).view(np.float32)
    ranks = _ranks(values)
    entries = []
    for i, k in enumerate(num_top):
        others = np.flatnonzero(ids[i, :k] != tokens[i])
        entries.append(
            TokenLogprobs(
                np.concatenate((tokens[i : i + 1], ids[i, others]), dtype=np.int32),
                np.concatenate((value[i], values[i, others])),
                np.concatenate((packed[i, 1:2], ranks[i, others])),
            )
        )
    return entries


def _ranks(values: Float32) -> Int32:
    """Ranks of values [P, K] in falling order; equal values share the first one's."""
    ranks = np.tile(np.arange(1, values.shape[1] + 1, dtype=np.int32), (len(values), 1))
    ranks[:, 1:][values[:, 1:] == values[:, :-1]] = 1
    return np.maximum.accumulate(ranks, axis=1)


def download(tensor: Tensor) -> Tensor:
    """A copy on the host that is valid once the device has finished; nothing waits for it here."""
    if tensor.is_cpu:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
        tensor, non_blocking=True
    )
