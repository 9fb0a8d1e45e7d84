"""From logits to tokens: what each row asked for, kept on the device, applied to every draw.

    S sequences in the draw   V vocabulary   R rows   L positions per row   A rows that start

Parameters are written when a row starts, in one upload for all that start together. What depends on
the draw's rows alone is derived when the rows change. A draw reads nothing on the host: tokens, bad
rows and log-probabilities are read when the device has finished.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pagedcore.config import LogprobsMode
from pagedcore.execution.logits import History, LogitEdits, row_edits, upload
from pagedcore.execution.logits_processors import LogitsProcessors
from pagedcore.execution.logprobs import PendingLogprobs, download, pack, unpack
from pagedcore.execution.ops import Ops, SamplingTensors
from pagedcore.execution.torch_sampling import filter_scores, uniform
from pagedcore.step import Admission, Int32, Int64, TokenLogprobs

_MAX_SCORES = 2**25
"""Elements of the [P, V] float32 scores that log-probabilities use at a time: 128 MiB."""

_NONE = -1
"""In place of a number of log-probabilities: none asked for."""


@dataclass(slots=True)
class Drawn:
    """One draw. Tensors are on the device, and may not be computed yet."""

    tokens: Tensor
    """[S] int64"""

    bad: Tensor
    """[S] bool: the largest logit was not finite (NaN, or nothing left to draw), so the token has
    no meaning."""

    logprobs: PendingLogprobs | None
    """For the sequences that asked, if any did."""


@dataclass(slots=True)
class _Wanted:
    """The sequences of a draw that asked for log-probabilities."""

    index: Int64
    index_device: Tensor
    num_top: list[int]


@dataclass(slots=True)
class _Batch:
    """What follows from the rows of a draw, whatever its step."""

    rows: Int32
    sampling: SamplingTensors
    seeds: Tensor
    edited: bool
    wanted: _Wanted | None


class Sampler:
    """Draws one token per sequence, in the order of semantics SAMPLE-5.

    `ops.sample` does the draw; `num_rows` is R. The random numbers of a sequence depend on its
    seed and on positions alone (SAMPLE-10).
    """

    def __init__(
        self,
        ops: Ops,
        *,
        num_rows: int,
        vocab_size: int,
        device: torch.device,
        logprobs_mode: LogprobsMode,
        processors: LogitsProcessors | None = None,
    ) -> None:
        self._ops = ops
        self._vocab_size = vocab_size
        self._device = device
        self._is_raw = logprobs_mode.startswith("raw")
        self._is_normalised = logprobs_mode.endswith("logprobs")
        self._edits = LogitEdits(vocab_size=vocab_size, device=device, processors=processors)
        # [5, R] temperature, min_p and top_p as bits of a float64; top_k; seed
        self._state = torch.zeros(5, num_rows, dtype=torch.int64, device=device)
        self._zeros = torch.zeros(num_rows, device=device)
        self._ones = torch.ones(num_rows, device=device)
        self._is_greedy = np.ones(num_rows, np.bool_)
        self._is_filtered = np.zeros(num_rows, np.bool_)
        self._is_edited = np.zeros(num_rows, np.bool_)
        self._num_logprobs = np.full(num_rows, _NONE, np.int64)
        self._num_prompt_logprobs = np.full(num_rows, _NONE, np.int64)
        self._last: _Batch | None = None

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Take over what rows that start ask for, before their first draw."""
        if not admissions:
            return
        self._last = None
        written = np.empty((6, len(admissions)), np.int64)
        floats = written[1:4].view(np.float64)
        for i, admission in enumerate(admissions):
            row, params = admission.row, admission.request.params
            top_k = params.top_k if 0 < params.top_k < self._vocab_size else 0
            written[0, i], written[4, i], written[5, i] = row, top_k, admission.seed
            temperature = 0.0 if params.is_greedy else params.temperature
            floats[:, i] = temperature, params.min_p, params.top_p
            edits = row_edits(admission.request)
            self._edits.set_row(row, edits)
            self._is_edited[row] = edits is not None
            self._is_greedy[row] = params.is_greedy
            self._is_filtered[row] = params.min_p > 0 or top_k > 0 or params.top_p < 1
            self._num_logprobs[row] = self._num_top(params.logprobs)
            self._num_prompt_logprobs[row] = self._num_top(params.prompt_logprobs)
        columns = upload(written, self._device)
        self._state.index_copy_(1, columns[0], columns[1:])

    def is_plain(self, rows: Int32) -> bool:
        """Whether no sequence of rows [S] wants edited logits or log-probabilities."""
        return not (self._is_edited[rows].any() or (self._num_logprobs[rows] != _NONE).any())

    def is_greedy(self, rows: Int32) -> bool:
        """Whether every sequence of rows [S] takes the most likely token."""
        return bool(self._is_greedy[rows].all())

    def is_filtered(self, rows: Int32) -> bool:
        """Whether some sequence of rows [S] uses min_p, top_k or top_p."""
        return bool(self._is_filtered[rows].any())

    def wants_prompt_logprobs(self, row: int) -> int | None:
        """How many of the most likely tokens the prompt positions of `row` report; None: none."""
        wanted = int(self._num_prompt_logprobs[row])
        return None if wanted == _NONE else wanted

    def draw(
        self,
        logits: Tensor,
        rows: Int32,
        rows_device: Tensor,
        num_known: Tensor,
        tokens_table: Tensor,
        longest: int,
    ) -> Drawn:
        """Draw a token from each row of logits [S, V], in any float type; they are not changed.

        `rows` [S], the same array object while the rows are the same, and never written to again;
        `rows_device` [S] int64, the same rows on the device. `num_known` [S] int64: known tokens
        of each sequence, so the position that the new one takes; `longest`, on the host, is at
        least the largest. `tokens_table` [R, L] int32 holds the known tokens by row.
        """
        batch = self._last
        if batch is None or batch.rows is not rows:
            batch = self._last = self._derive(rows, rows_device)
        sampling, edited = batch.sampling, logits
        if not sampling.all_greedy:
            sampling.uniform = uniform(batch.seeds, num_known)
        if batch.edited:
            edited = logits.to(torch.float32, copy=True)
            history = History(tokens_table, rows_device, num_known, longest)
            self._edits.apply(edited, rows, history)
        tokens = self._ops.sample(edited, sampling)
        logprobs = None
        if batch.wanted is not None:
            scored = logits if self._is_raw else edited
            logprobs = self._logprobs(scored, tokens, sampling, batch.wanted)
        return Drawn(tokens, _is_bad(edited, tokens), logprobs)

    def draw_by_row(
        self, logits: Tensor, rows: Tensor, num_known: Tensor, *, all_greedy: bool, any_filter: bool
    ) -> Tensor:
        """Tokens int64 [S] for rows [S] int64 that only the device knows, as in graphs.

        They must be rows that `is_plain`; `all_greedy` and `any_filter` say what they may hold.
        """
        if all_greedy:
            return self._ops.sample(logits, self._greedy(len(rows)))
        sampling, seeds = self._sampling(rows, all_greedy, any_filter)
        sampling.uniform = uniform(seeds, num_known)
        return self._ops.sample(logits, sampling)

    def prompt_logprobs(self, logits: Tensor, next_tokens: Tensor, k: int) -> list[TokenLogprobs]:
        """Log-probabilities at N prompt positions, before any edit or filter. Waits for the device.

        `logits` [N, V] in any float type; `next_tokens` [N] int64 are those that follow in the
        prompt; `k` is how many of the most likely to report.
        """
        tokens = next_tokens.long()
        packed = pack(self._values(logits.float()), tokens, k).cpu().numpy()
        return unpack(packed, tokens.cpu().numpy().astype(np.int32), [k] * len(packed))

    def _num_top(self, asked: int | None) -> int:
        if asked is None:
            return _NONE
        return self._vocab_size if asked < 0 else min(asked, self._vocab_size)

    def _derive(self, rows: Int32, rows_device: Tensor) -> _Batch:
        sampling, seeds = self._sampling(rows_device, self.is_greedy(rows), self.is_filtered(rows))
        num_top = self._num_logprobs[rows]
        index = np.flatnonzero(num_top != _NONE)
        wanted = None
        if len(index):
            wanted = _Wanted(index, upload(index, self._device), num_top[index].tolist())
        return _Batch(rows, sampling, seeds, bool(self._is_edited[rows].any()), wanted)

    def _sampling(
        self, rows: Tensor, all_greedy: bool, any_filter: bool
    ) -> tuple[SamplingTensors, Tensor]:
        """Parameters and seeds [S] int64 of rows [S] on the device."""
        columns = self._state.index_select(1, rows)
        temperature, min_p, top_p = columns[:3].view(torch.float64).float()
        sampling = SamplingTensors(
            temperature=temperature,
            min_p=min_p,
            top_k=columns[3].int(),
            top_p=top_p,
            uniform=torch.zeros_like(temperature),
            all_greedy=all_greedy,
            any_filter=any_filter,
        )
        return sampling, columns[4]

    def _greedy(self, num_rows: int) -> SamplingTensors:
        """Parameters that take the most likely token, without a kernel to make them."""
        zeros, ones = self._zeros[:num_rows], self._ones[:num_rows]
        return SamplingTensors(
            temperature=zeros,
            min_p=zeros,
            top_k=zeros.view(torch.int32),
            top_p=ones,
            uniform=zeros,
            all_greedy=True,
            any_filter=False,
        )

    def _logprobs(
        self, logits: Tensor, tokens: Tensor, sampling: SamplingTensors, wanted: _Wanted
    ) -> PendingLogprobs:
        num_top, size = max(wanted.num_top), max(1, _MAX_SCORES // self._vocab_size)
        pieces = []
        for index in torch.split(wanted.index_device, size):
            scores = logits[index].float()
            if not self._is_raw:
                scores = filter_scores(scores, _pick(sampling, index))
            pieces.append(pack(self._values(scores), tokens[index], num_top))
        return PendingLogprobs(download(torch.cat(pieces)), wanted.index, wanted.num_top)

    def _values(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1) if self._is_normalised else scores


def _is_bad(logits: Tensor, tokens: Tensor) -> Tensor:
    """Whether the largest of each row [S, V] is not finite; `Ops.sample` draws it then."""
    return ~logits.gather(1, tokens[:, None])[:, 0].isfinite()


def _pick(sampling: SamplingTensors, index: Tensor) -> SamplingTensors:
    """The parameters of some sequences only."""
    return replace(
        sampling,
        temperature=sampling.temperature[index],
        min_p=sampling.min_p[index],
        top_k=sampling.top_k[index],
        top_p=sampling.top_p[index],
        uniform=sampling.uniform[index],
    )
