"""Hidden states into vectors, for sequences that want one in place of a token.

    T tokens   S sequences   P sequences that end in this step   h hidden size

A prompt may run in several steps: what an earlier one leaves for the last, a sum or the first
token's hidden state, stays on the device. Cutting and scaling are done on the host, in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedcore.execution.logits import upload
from pagedcore.execution.logprobs import download
from pagedcore.pooling import Pooling, PoolingParams
from pagedcore.step import Admission, Bool, Float32, Int32, Int64, StepPlan

NOT_FINITE = "the vector is not finite: the model's hidden states held NaN or infinity"


@dataclass(slots=True)
class PendingVectors:
    """The vectors of one step, on their way to the host."""

    packed: list[tuple[list[int], Tensor]]
    """Indices in the plan, and their vectors [P, n] float32 on the host, once the step has run."""

    params: dict[int, PoolingParams]
    """By index in the plan."""

    def result(self) -> dict[int, Float32]:
        """By index in the plan. Call when the device has finished."""
        found: dict[int, Float32] = {}
        for indices, vectors in self.packed:
            found.update(zip(indices, vectors.numpy(), strict=True))
        return {i: _finished(found[i], params) for i, params in self.params.items()}


@dataclass(slots=True)
class _Row:
    params: PoolingParams
    pooling: Pooling
    length: int
    """Of the prompt."""
    carried: Tensor | None = None
    """[h] From earlier steps: a sum in float32, or the first token's hidden state."""


class Pooler:
    """Pools the rows that ask for it."""

    def __init__(
        self, classify: Callable[[Tensor], Tensor], scored: Pooling, device: torch.device
    ) -> None:
        """`classify` maps hidden states [P, h], pooled as `scored`, to scores [P, n]."""
        self._classify = classify
        self._scored = scored
        self._device = device
        self._rows: dict[int, _Row] = {}

    def __bool__(self) -> bool:
        """Whether any row wants a vector."""
        return bool(self._rows)

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Note what rows want that start, or start again."""
        for admission in admissions:
            self._rows.pop(admission.row, None)
            params = admission.request.pooling
            if params is None:
                continue
            assert params.pooling is not None, "front ends settle what a vector is made of"
            pooling = self._scored if params.pooling == "scores" else params.pooling
            length = len(admission.request.prompt_token_ids)
            self._rows[admission.row] = _Row(params, pooling, length)

    def drawing(self, plan: StepPlan) -> Int64:
        """[K] Sequences that draw a token and no vector, by index in the plan."""
        return np.flatnonzero(plan.samples & ~self.mask(plan.rows) if self._rows else plan.samples)

    def mask(self, rows: Int32) -> Bool:
        """[S] Which of `rows` want a vector."""
        if not self._rows:
            return np.zeros(len(rows), np.bool_)
        return np.isin(rows, list(self._rows))

    def token_types(self, plan: StepPlan) -> Tensor | None:
        """[T] int64: 1 for tokens of a prompt's second text, else 0; None where all are 0."""
        types = None
        ends = np.cumsum(plan.num_scheduled)
        for i, row in enumerate(plan.rows.tolist()):
            held = self._rows.get(row)
            if held is None or held.params.num_first is None:
                continue
            if types is None:
                types = np.zeros(int(ends[-1]), np.int64)
            first = held.params.num_first - int(plan.num_computed[i])
            start = int(ends[i] - plan.num_scheduled[i])
            types[min(start + max(first, 0), int(ends[i])) : int(ends[i])] = 1
        return None if types is None else upload(types, self._device)

    def pool(self, plan: StepPlan, hidden: Tensor) -> PendingVectors | None:
        """Take the hidden states [T, h] of a step; the vectors of the prompts that it completes."""
        ends = np.cumsum(plan.num_scheduled, dtype=np.int64)
        complete: dict[Pooling, list[int]] = {}
        for i, row in enumerate(plan.rows.tolist()):
            held = self._rows.get(row)
            if held is None:
                continue
            if plan.samples[i]:
                complete.setdefault(held.pooling, []).append(i)
            else:
                tokens = hidden[int(ends[i] - plan.num_scheduled[i]) : int(ends[i])]
                _carry(held, tokens)
        if not complete:
            return None
        found: dict[int, PoolingParams] = {}
        packed: list[tuple[list[int], Tensor]] = []
        for pooling, indices in complete.items():
            rows = [self._rows.pop(row) for row in plan.rows[indices].tolist()]
            counts = plan.num_scheduled[indices].astype(np.int64)
            vectors = _POOLINGS[pooling](hidden, ends[indices] - counts, counts, rows)
            found.update((i, row.params) for i, row in zip(indices, rows, strict=True))
            packed += self._scored_apart(indices, rows, vectors, hidden.dtype)
        return PendingVectors(packed, found)

    def _scored_apart(
        self, indices: list[int], rows: list[_Row], vectors: Tensor, dtype: torch.dtype
    ) -> list[tuple[list[int], Tensor]]:
        """Vectors [P, h] on their way to the host, and scores in place of those that want these.

        The classifier is given `dtype`, the model's: a mean is in float32.
        """
        scored = [row.params.pooling == "scores" for row in rows]
        parts: list[tuple[list[int], Tensor]] = []
        for wanted in (False, True):
            chosen = [k for k, is_scored in enumerate(scored) if is_scored is wanted]
            if not chosen:
                continue
            part = vectors
            if len(chosen) < len(rows):
                part = vectors[upload(np.array(chosen, np.int64), vectors.device)]
            if wanted:
                part = self._classify(part.to(dtype))
            parts.append(([indices[k] for k in chosen], download(part.float())))
        return parts


def _carry(held: _Row, tokens: Tensor) -> None:
    """Keep what the last step of a prompt will need of one before it."""
    if held.pooling == "mean":
        total = tokens.sum(0, dtype=torch.float32)
        held.carried = total if held.carried is None else held.carried + total
    elif held.pooling == "cls" and held.carried is None:
        held.carried = tokens[0].clone()


def _last(hidden: Tensor, starts: Int64, counts: Int64, rows: Sequence[_Row]) -> Tensor:
    return hidden[upload(starts + counts - 1, hidden.device)]


def _cls(hidden: Tensor, starts: Int64, counts: Int64, rows: Sequence[_Row]) -> Tensor:
    vectors = hidden[upload(starts, hidden.device)]
    for k, row in enumerate(rows):
        if row.carried is not None:
            vectors[k] = row.carried
    return vectors


def _mean(hidden: Tensor, starts: Int64, counts: Int64, rows: Sequence[_Row]) -> Tensor:
    at = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
    tokens = hidden
    if len(at) < len(hidden):
        tokens = hidden[upload(at, hidden.device)]
    lengths = upload(counts, hidden.device)
    sums = torch.segment_reduce(tokens.float(), "sum", lengths=lengths, unsafe=True)
    for k, row in enumerate(rows):
        if row.carried is not None:
            sums[k] += row.carried
    lengths = upload(np.array([row.length for row in rows], np.int64), hidden.device)
    return sums / lengths[:, None]


_Pool = Callable[[Tensor, Int64, Int64, Sequence[_Row]], Tensor]
_POOLINGS: dict[Pooling, _Pool] = {"last": _last, "cls": _cls, "mean": _mean}
"""Each maps hidden states [T, h], first tokens and token counts [P] to vectors [P, h]."""


def _finished(vector: Float32, params: PoolingParams) -> Float32:
    """The vector as it was asked for."""
    if params.dimensions is not None:
        vector = vector[: params.dimensions]
    if params.normalize:
        length = float(np.sqrt(np.dot(vector, vector)))
        return vector / np.float32(max(length, 1e-12))
    return np.array(vector)
