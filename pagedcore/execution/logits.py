"""Change logits before a draw, for the sequences that ask for it: masks, biases and penalties.

    S sequences in the draw   V vocabulary   R rows   L positions per row
    P sequences that ask for an edit          N single edits of them all

The order is that of semantics SAMPLE-5: allowed ids and bad words, min-tokens mask and logit bias,
what plugins change, penalties. What a request asks for becomes arrays when it is admitted; they are
joined to device tensors when the draw's rows change, and not in each step. Earlier tokens are read
from the token table on the device alone, since with overlapped steps the host does not know the
last of them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagedcore.execution.logits_processors import LogitsProcessors, ProcessorEdit
from pagedcore.request import Request
from pagedcore.step import Int32, Int64

_MAX_COUNTS = 2**24
"""Elements of the [P, V] float32 counts that penalties use at a time: 64 MiB."""


@dataclass(slots=True)
class RowEdits:
    """What one sequence asks for."""

    num_prompt_tokens: int
    allowed: NDArray[np.int64] | None = None
    """[N] The only ids it may draw."""

    bad_words: list[tuple[int, ...]] = field(default_factory=list)
    """Sequences of tokens, the last of which may not follow the others."""

    min_tokens: int = 0
    """Outputs before which it may not end."""

    ending: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """[N] EOS and stop ids."""

    eos: int = -1
    """Let through when nothing else is left."""

    bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits, by token id."""

    processors: dict[str, Any] = field(default_factory=dict)
    """What each processor of a plugin is told, by its name."""

    penalties: tuple[float, float, float] | None = None
    """Repetition, frequency, presence."""


def row_edits(request: Request) -> RowEdits | None:
    """What `request` asks for; None when its logits are drawn from as they are."""
    params = request.params
    edits = RowEdits(
        num_prompt_tokens=len(request.prompt_token_ids),
        bad_words=[word for word in request.bad_words_token_ids if word],
        bias=dict(params.logit_bias or {}),
        processors=dict(params.logits_processors or {}),
    )
    if params.allowed_token_ids is not None:
        edits.allowed = np.unique(np.asarray(params.allowed_token_ids, np.int64))
    ending = {*params.stop_token_ids, request.eos_token_id} - {-1}
    if params.min_tokens > 0 and ending:
        edits.min_tokens = params.min_tokens
        edits.ending = np.array(sorted(ending), np.int64)
        edits.eos = request.eos_token_id
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    if penalties != (1.0, 0.0, 0.0):
        edits.penalties = penalties
    asked = edits.bad_words or edits.bias or edits.penalties or edits.min_tokens or edits.processors
    return edits if asked or edits.allowed is not None else None


class LogitEdits:
    """The edits of all rows, and those of the draw at hand as device tensors."""

    def __init__(
        self,
        *,
        vocab_size: int,
        device: torch.device,
        processors: LogitsProcessors | None = None,
    ) -> None:
        """`processors` are those that rows may ask for."""
        self._processors = processors
        self._vocab_size = vocab_size
        self._device = device
        self._by_row: dict[int, RowEdits] = {}
        self._rows: Int32 = np.empty(0, np.int32)
        self._batch: list[_Edit | ProcessorEdit] | None = None

    def set_row(self, row: int, edits: RowEdits | None) -> None:
        """Replace what `row` asks for."""
        self._batch = None
        if edits is None:
            self._by_row.pop(row, None)
        else:
            self._by_row[row] = edits

    def apply(self, logits: Tensor, rows: Int32, history: "History") -> None:
        """Edit logits [S, V] float32 in place; `rows` [S] tells whose they are.

        A row for which nothing is left is all -inf, but where min_tokens took the rest away: EOS is
        let through then (STOP-3).
        """
        if self._batch is None or not np.array_equal(rows, self._rows):
            self._rows, self._batch = rows.copy(), self._join(rows)
        for edit in self._batch:
            edit.apply(logits, history)

    def _join(self, rows: Int32) -> "list[_Edit | ProcessorEdit]":
        asked = [
            (i, self._by_row[row]) for i, row in enumerate(rows.tolist()) if row in self._by_row
        ]
        joined = (
            _allowed_ids(asked, self._vocab_size, self._device),
            _bad_words(asked, self._device),
            _min_tokens(asked, self._device),
            _bias(asked, self._device),
            *_processors(asked, self._processors, self._device),
            _penalties(asked, self._device),
        )
        return [edit for edit in joined if edit is not None]


@dataclass(slots=True)
class History:
    """The known tokens of the draw's sequences."""

    tokens: Tensor
    """[R, L] int32, by row."""

    rows: Tensor
    """[S] Row of each sequence, on the device."""

    num_known: Tensor
    """[S] int64: tokens known of each, and so the position that the new one takes."""

    longest: int
    """At least the largest `num_known`, on the host."""


_Asked = list[tuple[int, RowEdits]]


class _Edit(ABC):
    """One kind of edit, of all sequences that ask for it. `index` [P or N] says which they are."""

    @abstractmethod
    def apply(self, logits: Tensor, history: History) -> None:
        """Edit logits [S, V] in place."""


@dataclass(slots=True)
class _AllowedIds(_Edit):
    index: Tensor
    forbidden: Tensor
    """[P, V] bool"""

    def apply(self, logits: Tensor, history: History) -> None:
        logits[self.index] = logits[self.index].masked_fill_(self.forbidden, -torch.inf)


def _allowed_ids(asked: _Asked, vocab_size: int, device: torch.device) -> _AllowedIds | None:
    ours = [(i, edits.allowed) for i, edits in asked if edits.allowed is not None]
    if not ours:
        return None
    forbidden = np.ones((len(ours), vocab_size), np.bool_)
    for line, (_, allowed) in zip(forbidden, ours, strict=True):
        line[allowed] = False
    return _AllowedIds(_upload([i for i, _ in ours], device), _upload(forbidden, device))


@dataclass(slots=True)
class _BadWords(_Edit):
    index: Tensor
    earlier: Tensor
    """[N, M] The tokens before the last, right-aligned; -1 fills shorter words up."""

    last: Tensor
    num_prompt_tokens: Tensor

    def apply(self, logits: Tensor, history: History) -> None:
        width = self.earlier.shape[1]
        offsets = torch.arange(-width, 0, device=logits.device)
        positions = history.num_known[self.index][:, None] + offsets
        rows = history.rows[self.index].long()[:, None]
        found = history.tokens[rows, positions.clamp(min=0)]
        is_output = positions >= self.num_prompt_tokens[:, None]
        matches = ((found == self.earlier) & is_output) | (self.earlier < 0)
        _mask_where(matches.all(-1), logits, self.index, self.last)


def _bad_words(asked: _Asked, device: torch.device) -> _BadWords | None:
    words = [(i, word, edits) for i, edits in asked for word in edits.bad_words]
    if not words:
        return None
    earlier = np.full((len(words), max(len(word) for _, word, _ in words) - 1), -1, np.int64)
    for line, (_, word, _) in zip(earlier, words, strict=True):
        if len(word) > 1:
            line[1 - len(word) :] = word[:-1]
    return _BadWords(
        index=_upload([i for i, _, _ in words], device),
        earlier=_upload(earlier, device),
        last=_upload([word[-1] for _, word, _ in words], device),
        num_prompt_tokens=_upload([edits.num_prompt_tokens for _, _, edits in words], device),
    )


@dataclass(slots=True)
class _MinTokens(_Edit):
    index: Tensor
    ending: Tensor
    until: Tensor
    """[N] Known tokens before which the ending is masked."""

    eos_index: Tensor
    eos: Tensor
    eos_until: Tensor

    def apply(self, logits: Tensor, history: History) -> None:
        eos_logits = logits[self.eos_index, self.eos]
        _mask_where(history.num_known[self.index] < self.until, logits, self.index, self.ending)
        nothing_left = logits[self.eos_index].amax(-1) == -torch.inf
        nothing_left &= history.num_known[self.eos_index] < self.eos_until
        let_through = eos_logits.masked_fill(eos_logits == -torch.inf, 0.0)  # the only one left
        logits[self.eos_index, self.eos] = torch.where(
            nothing_left, let_through, logits[self.eos_index, self.eos]
        )


def _min_tokens(asked: _Asked, device: torch.device) -> _MinTokens | None:
    ours = [(i, edits, edits.num_prompt_tokens + edits.min_tokens) for i, edits in asked]
    ours = [item for item in ours if item[1].min_tokens]
    if not ours:
        return None
    flat = [(i, token, until) for i, edits, until in ours for token in edits.ending.tolist()]
    eos = [(i, edits.eos, until) for i, edits, until in ours if edits.eos >= 0]
    index, ending, until = _upload(np.array(flat, np.int64).T, device)
    eos_index, eos_ids, eos_until = _upload(np.array(eos, np.int64).reshape(-1, 3).T, device)
    return _MinTokens(index, ending, until, eos_index, eos_ids, eos_until)


@dataclass(slots=True)
class _Bias(_Edit):
    index: Tensor
    token: Tensor
    value: Tensor

    def apply(self, logits: Tensor, history: History) -> None:
        logits.index_put_((self.index, self.token), self.value, accumulate=True)


def _bias(asked: _Asked, device: torch.device) -> _Bias | None:
    flat = [(i, token, value) for i, edits in asked for token, value in edits.bias.items()]
    if not flat:
        return None
    index, token = _upload(np.array([item[:2] for item in flat], np.int64).T, device)
    return _Bias(index, token, _upload(np.array([item[2] for item in flat], np.float32), device))


def _processors(
    asked: _Asked, processors: LogitsProcessors | None, device: torch.device
) -> list[ProcessorEdit]:
    joined: list[ProcessorEdit] = []
    for name in sorted({name for _, edits in asked for name in edits.processors}):
        assert processors is not None, "requests are checked when they arrive"
        ours = [(i, edits) for i, edits in asked if name in edits.processors]
        joined.append(
            ProcessorEdit(
                name=name,
                processor=processors.get(name),
                arguments=[edits.processors[name] for _, edits in ours],
                index=_upload([i for i, _ in ours], device),
                num_prompt=_upload([edits.num_prompt_tokens for _, edits in ours], device),
            )
        )
    return joined


@dataclass(slots=True)
class _Penalties(_Edit):
    """Semantics SAMPLE-6: repetition over prompt and output; the others over the output."""

    index: Tensor
    num_prompt_tokens: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor

    def apply(self, logits: Tensor, history: History) -> None:
        size = max(1, _MAX_COUNTS // logits.shape[1])
        for start in range(0, len(self.index), size):
            self._apply(logits, history, slice(start, start + size))

    def _apply(self, logits: Tensor, history: History, part: slice) -> None:
        index, vocab_size = self.index[part], logits.shape[1]
        tokens = history.tokens[history.rows[index].long(), : history.longest].long()
        position = torch.arange(tokens.shape[1], device=logits.device)
        known = position < history.num_known[index][:, None]
        output = known & (position >= self.num_prompt_tokens[part, None])

        edited = logits[index]
        seen = _count(tokens, known, vocab_size) > 0
        by = self.repetition[part, None]
        edited = torch.where(seen, torch.where(edited > 0, edited / by, edited * by), edited)
        counts = _count(tokens, output, vocab_size)
        edited -= self.frequency[part, None] * counts
        edited -= self.presence[part, None] * (counts > 0)
        logits[index] = edited


def _penalties(asked: _Asked, device: torch.device) -> _Penalties | None:
    ours = [(i, edits, edits.penalties) for i, edits in asked if edits.penalties is not None]
    if not ours:
        return None
    repetition, frequency, presence = _upload(
        np.array([p for _, _, p in ours], np.float32).T, device
    )
    return _Penalties(
        index=_upload([i for i, _, _ in ours], device),
        num_prompt_tokens=_upload([edits.num_prompt_tokens for _, edits, _ in ours], device),
        repetition=repetition,
        frequency=frequency,
        presence=presence,
    )


def _count(tokens: Tensor, which: Tensor, vocab_size: int) -> Tensor:
    """How often each id stands in tokens [P, L] where `which` [P, L] is true: [P, V] float32."""
    counts = torch.zeros(len(tokens), vocab_size + 1, device=tokens.device)
    slots = torch.where(which, tokens, vocab_size)  # a last column takes what does not count
    counts.scatter_add_(1, slots, torch.ones((), device=tokens.device).expand_as(slots))
    return counts[:, :vocab_size]


def _mask_where(condition: Tensor, logits: Tensor, index: Tensor, token: Tensor) -> None:
    """Set logits[index, token] to -inf where the condition holds; pairs may repeat. All are [N]."""
    masks = torch.where(condition, -torch.inf, 0.0)
    logits.index_put_((index, token), masks, accumulate=True)


def _upload(values: "list[int] | NDArray[np.generic]", device: torch.device) -> Tensor:
    """A host array on the device, without waiting for what the device is doing."""
    array: NDArray[np.generic] | Int64 = (
        np.array(values, np.int64) if isinstance(values, list) else np.ascontiguousarray(values)
    )
    return upload(array, device)


def upload(array: "NDArray[np.generic]", device: torch.device) -> Tensor:
    """Copy an array to the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)
