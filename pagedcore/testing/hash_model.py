"""A model without weights whose next token is a hash of everything before it, read from the cache.

    R rows    G cache groups    M table entries per row    N blocks    B block size    L longest

It runs `StepPlan`s as an executor does, on a fake cache that it reaches through the block tables
only: one layer per cache group, each of which writes a *tag* for every new token and then attends
to the tags of the past. A block that is stale, foreign or not yet written changes every token that
comes after. `reference_states` is the same model without cache, batch or table.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedcore.cache_spec import CacheGroup
from pagedcore.request import Request
from pagedcore.step import Int32, StepPlan, StepResult, TokenLogprobs

UInt64 = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
NAN = np.uint64(_MASK)
"""A state or tag that is not a number: whatever sees it becomes the same."""


def mix(values: UInt64) -> UInt64:
    """Scramble each of `values` [...]: the finalizer of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def salt_of(request: Request) -> int:
    """What `cache_salt` contributes to every token, so that wrong sharing shows."""
    state = 0
    for byte in (request.cache_salt or "").encode():
        state = (state * 257 + byte + 1) & _MASK
    return state


def embed(tokens: Int32, salt: int) -> UInt64:
    """[T] What the first layer sees of tokens [T]."""
    spread = tokens.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(salt)
    return mix(spread + np.uint64(1))


def tags_of(states: UInt64, group: int) -> UInt64:
    """[T] What the layer of a group writes into the cache."""
    return np.where(states == NAN, NAN, mix(states + np.uint64(group + 1)))


def attend(states: UInt64, start: int, tags: UInt64, first: int, window: int | None) -> UInt64:
    """[T] States after attention, for queries at positions start, start + 1, ...

    `tags` [start + T - first] are those of positions first, first + 1, ...
    """
    positions = np.arange(first, first + len(tags), dtype=np.uint64)
    sums = np.zeros(len(tags) + 1, np.uint64)
    np.cumsum(mix(tags ^ (positions * np.uint64(_GOLDEN))), out=sums[1:])
    ends = np.arange(start + 1 - first, start + 1 - first + len(states))
    seen = sums[ends]
    if window is not None:
        seen = seen - sums[np.maximum(ends - window, 0)]
    after = mix(states ^ seen)
    if NAN in tags or NAN in states:
        bad = np.concatenate(([0], np.cumsum(tags == NAN)))
        start_of = np.maximum(ends - window, 0) if window is not None else 0
        after[(bad[ends] > bad[start_of]) | (states == NAN)] = NAN
    return after


def draw(state: int, request: Request, seed: int, position: int, vocab_size: int) -> int:
    """The token at `position`, after a last state: sampled ones depend on seed and position."""
    if request.params.is_greedy:
        return state % vocab_size
    noise = (state + (seed + position + 1) * _GOLDEN) & _MASK
    return int(mix(np.array([noise], np.uint64))[0]) % vocab_size


def reference_tags(
    tokens: Sequence[int] | Int32, salt: int, windows: Sequence[int | None]
) -> tuple[list[UInt64], UInt64]:
    """Tags [L] of each group and last states [L] of `tokens` [L], computed in one piece."""
    states = embed(np.asarray(tokens, np.int32), salt)
    tags = []
    for group, window in enumerate(windows):
        tags.append(tags_of(states, group))
        states = attend(states, 0, tags[-1], 0, window)
    return tags, states


@dataclass(slots=True)
class Fault:
    """What goes wrong in a step that is launched with it."""

    rows: frozenset[int] | None = None
    """Rows whose numbers are no longer finite; None is the whole step."""

    before_anything: bool = False
    """A whole step fails before the device learns anything of its plan."""


@dataclass(slots=True)
class PendingHashStep:
    """A step that has run; `result` hands it over, or raises what made it fail."""

    outcome: StepResult | Exception

    def result(self) -> StepResult:
        """What the step produced."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@dataclass(slots=True)
class _Row:
    request: Request
    salt: int
    seed: int


class HashModel:
    """Runs plans at their launch, in order, as a device does; results are taken later.

    Raises AssertionError for a plan that no correct scheduler makes.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        groups: Sequence[CacheGroup],
        vocab_size: int = 2,
    ) -> None:
        """The null block is one of `num_blocks`; all begin as garbage."""
        self.windows = [group.spec.window for group in groups]
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.cache: UInt64 = np.zeros((num_blocks, block_size), np.uint64)
        """[N, B] Tags."""
        self.tokens = np.full((num_rows, max_model_len + 1), -1, np.int32)
        """[R, L + 1] Known tokens, and those that were drawn in flight."""
        max_blocks = -(-(max_model_len + 1) // block_size)
        self.tables = np.zeros((len(groups), num_rows, max_blocks), np.int32)
        """[G, R, M] Block tables."""
        self.faults: deque[Fault | None] = deque()
        """For the next launches, in order."""
        self.num_launched = 0
        self._rows: dict[int, _Row] = {}
        self._num_poisoned = 0
        self.poison(range(num_blocks))

    def poison(self, blocks: Sequence[int] | range) -> None:
        """Overwrite blocks with what no token ever hashes to."""
        for block in blocks:
            self._num_poisoned += 1
            start = np.uint64(self._num_poisoned * 0x1234567)
            self.cache[block] = mix(np.arange(self.block_size, dtype=np.uint64) - start)

    def launch(self, plan: StepPlan) -> PendingHashStep:
        """Run a step now; its fault, if it has one, is told by `result`."""
        self.num_launched += 1
        fault = self.faults.popleft() if self.faults else None
        if fault is not None and fault.rows is None and fault.before_anything:
            return PendingHashStep(RuntimeError("the step could not begin"))
        self._check(plan)
        self._begin(plan)
        result = self._run(plan, fault)
        if fault is not None and fault.rows is None:
            return PendingHashStep(RuntimeError("the device failed"))
        return PendingHashStep(result)

    def shutdown(self) -> None:
        """Forget everything."""
        self._rows.clear()

    def _check(self, plan: StepPlan) -> None:
        counts = plan.num_scheduled
        assert len(set(plan.rows.tolist())) == len(plan.rows), "a row appears twice"
        assert (counts >= 1).all(), "a sequence runs nothing"
        assert (counts[: plan.num_single] == 1).all(), "single sequences come first"
        assert (counts[plan.num_single :] > 1).all(), "single sequences come first"
        entries = [tuple(entry) for entry in plan.table_updates[:, :3].tolist()]
        assert len(set(entries)) == len(entries), "an entry is updated twice"
        written = plan.copies[:, 2].tolist()
        assert len(set(written)) == len(written), "two copies have one destination"
        assert not set(written) & set(plan.copies[:, 1].tolist()), "copies depend on their order"

    def _begin(self, plan: StepPlan) -> None:
        for admission in plan.admitted:
            row, request = admission.row, admission.request
            self._rows[row] = _Row(request, salt_of(request), admission.seed)
            self.tokens[row] = -1
            self.tokens[row, : len(admission.token_ids)] = admission.token_ids
            self.tables[:, row] = -1
        for group, row, index, block in plan.table_updates.tolist():
            self.tables[group, row, index] = block
        copied = [self.cache[source, :count].copy() for _, source, _, count in plan.copies.tolist()]
        for (_, _, target, count), tags in zip(plan.copies.tolist(), copied, strict=True):
            self.cache[target, :count] = tags

    def _run(self, plan: StepPlan, fault: Fault | None) -> StepResult:
        rows, starts = plan.rows.tolist(), plan.num_computed.tolist()
        ends = (plan.num_computed + plan.num_scheduled).tolist()
        states = []
        for row, start, end in zip(rows, starts, ends, strict=True):
            tokens = self.tokens[row, start:end]
            assert (tokens >= 0).all(), "a token is run that the device does not know"
            states.append(embed(tokens, self._rows[row].salt))
        bad = set(rows) if fault is not None and fault.rows is None else set()
        if fault is not None and fault.rows is not None:
            bad = set(fault.rows)
        for group, window in enumerate(self.windows):
            for i, row in enumerate(rows):  # all of a layer's writes come before its reads
                tags = tags_of(states[i], group)
                if row in bad:
                    tags[:] = NAN
                self._write(group, row, starts[i], tags)
            for i, row in enumerate(rows):
                first = 0 if window is None else max(0, starts[i] - window + 1)
                tags = self._read(group, row, first, ends[i])
                states[i] = attend(states[i], starts[i], tags, first, window)
        return self._draw(plan, ends, states)

    def _write(self, group: int, row: int, start: int, tags: UInt64) -> None:
        positions = np.arange(start, start + len(tags))
        blocks = self.tables[group, row, positions // self.block_size]
        assert (blocks > 0).all(), "a token has no slot"
        self.cache[blocks, positions % self.block_size] = tags

    def _read(self, group: int, row: int, first: int, end: int) -> UInt64:
        positions = np.arange(first, end)
        blocks = self.tables[group, row, positions // self.block_size]
        assert (blocks > 0).all(), "a position that attention sees has no slot"
        tags: UInt64 = self.cache[blocks, positions % self.block_size]
        return tags

    def _draw(self, plan: StepPlan, ends: list[int], states: list[UInt64]) -> StepResult:
        result = StepResult(np.full(len(ends), -1, np.int32))
        for i, row in enumerate(plan.rows.tolist()):
            held, end, last = self._rows[row], ends[i], int(states[i][-1])
            params = held.request.params
            if params.prompt_logprobs is not None:
                self._score_prompt(result, i, row, int(plan.num_computed[i]), states[i])
            if NAN in states[i]:
                result.failed[i] = "its numbers were not finite"  # type: ignore[index]
            if not plan.samples[i]:
                continue
            token = draw(last, held.request, held.seed, end, self.vocab_size)
            self.tokens[row, end] = result.tokens[i] = token
            if params.logprobs is not None:
                result.logprobs[i] = score(token, last)  # type: ignore[index]
        return result

    def _score_prompt(
        self, result: StepResult, index: int, row: int, start: int, states: UInt64
    ) -> None:
        prompt = self._rows[row].request.prompt_token_ids
        count = min(len(states), len(prompt) - 1 - start)
        if count > 0:
            following = prompt[start + 1 : start + 1 + count].tolist()
            entries = [
                score(token, int(state)) for token, state in zip(following, states, strict=False)
            ]
            result.prompt_logprobs[index] = entries  # type: ignore[index]


def score(token: int, state: int) -> TokenLogprobs:
    """A made-up log-probability of `token` after a last state."""
    value = -1.0 - (state >> 8) % 1000 / 100
    one: Any = np.array([token], np.int32)
    return TokenLogprobs(one, np.array([value], np.float32), np.ones(1, np.int32))
