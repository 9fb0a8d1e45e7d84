"""Attention of encoders, in plain torch: tokens of a prompt see the others, before and behind.

    T tokens   S sequences   n sequences of a part   L tokens of its longest   H heads   D head size

    qkv   [T, 3 * H * D]    queries, keys and values of each token
    out   [T, H * D]

Sequences of about the same length are taken together, side by side and padded with tokens of their
own, which a mask hides: so no sequence reads what is another's, and one layer of a step is a few
products, however many sequences there are. Nothing is kept of the past.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pagedcore.execution.ops import RopeTable, StepBatch

_STRIDE = 16
"""Lengths are taken together that round up to the same multiple of this."""

_MASK_ELEMENTS = 1 << 26
"""Of the masks [n, L, L] of a part whose attention has a window: 64 MiB."""


@dataclass(slots=True)
class _Part:
    """Sequences that are taken together."""

    index: Tensor
    """[n, L] int64: their tokens; where one is shorter, its last again."""

    length: Tensor | None
    """[n, 1] int64: their lengths; None where all have L."""

    tokens: Tensor | None
    """[m] int64: the places in `index` that are no padding; None where none is."""


def encode_attention(
    qkv: Tensor, num_heads: int, scale: float, batch: StepBatch, window: int | None = None
) -> Tensor:
    """Attention of each token over all tokens of its sequence: [T, H * D].

    With a `window`, a token sees those that are at most so many positions before or behind it.
    The step must hold sequences whole. Reads their lengths on the host, once per step.
    """
    heads = qkv.view(len(qkv), 3, num_heads, -1)
    out = torch.empty(len(qkv), num_heads, heads.shape[-1], dtype=qkv.dtype, device=qkv.device)
    for part in _once(batch, ("encoder parts",), _parts):
        query, key, value = heads[part.index].permute(2, 0, 3, 1, 4)  # each [n, H, L, D]
        mask = _once(batch, ("encoder mask", id(part), window), lambda _, p=part: _mask(p, window))
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        mixed = mixed.transpose(1, 2).flatten(0, 1)
        if part.tokens is None:
            out[part.index.flatten()] = mixed
        else:
            out[part.index.flatten()[part.tokens]] = mixed[part.tokens]
    return out.view(len(qkv), -1)


def rotate(qkv: Tensor, num_heads: int, rope: RopeTable, batch: StepBatch) -> None:
    """Turn queries and keys of qkv [T, 3 * H * D] in place, element i with i + D // 2."""
    cos, sin = _once(batch, ("encoder angles", id(rope)), lambda b: _angles(b, rope))
    heads = qkv.view(len(qkv), 3 * num_heads, -1)[:, : 2 * num_heads]
    turning = heads.float()
    half = turning.shape[-1] // 2
    heads.copy_((turning * cos).addcmul_(turning.roll(half, -1), sin))


def _angles(batch: StepBatch, rope: RopeTable) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, D] by which `rotate` multiplies each element."""
    cos, sin = rope.cos_sin.index_select(0, batch.positions)[:, None].chunk(2, -1)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _parts(batch: StepBatch) -> list[_Part]:
    starts = batch.query_start.tolist()
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(starts):
        by_length.setdefault(-(-(end - start) // _STRIDE), []).append((start, end - start))
    parts = []
    for sequences in by_length.values():
        longest = max(length for _, length in sequences)
        most = max(1, _MASK_ELEMENTS // longest**2)
        for at in range(0, len(sequences), most):
            parts.append(_part(sequences[at : at + most], batch.positions.device))
    return parts


def _part(sequences: list[tuple[int, int]], device: torch.device) -> _Part:
    start, length = torch.tensor(sequences).to(device, non_blocking=True).T[..., None]
    longest = max(count for _, count in sequences)
    place = torch.arange(longest, device=device)
    index = start + place.minimum(length - 1)
    if all(count == longest for _, count in sequences):
        return _Part(index, None, None)
    return _Part(index, length, torch.nonzero((place < length).flatten())[:, 0])


def _mask(part: _Part, window: int | None) -> Tensor | None:
    """Whether a key is seen: bool [n, 1, 1 or L, L]; None where all are."""
    place = torch.arange(part.index.shape[1], device=part.index.device)
    seen = None if part.length is None else (place < part.length)[:, None, None]
    if window is None or window >= len(place) - 1:
        return seen
    near = (place[:, None] - place).abs() <= window
    if seen is None:
        return near[None, None]
    # A padding token beyond the window of all real ones sees itself, lest it see nothing.
    return near & (seen | torch.eye(len(place), dtype=torch.bool, device=place.device))


def _once(batch: StepBatch, key: Any, make: Any) -> Any:
    """What `make` derives from the step: once, if the step's layers share."""
    if batch.shared is None:
        return make(batch)
    if key not in batch.shared:
        batch.shared[key] = make(batch)
    return batch.shared[key]
