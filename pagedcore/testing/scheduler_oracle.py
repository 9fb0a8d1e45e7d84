"""What must come out of a scheduler: each request's tokens by the unbatched reference, and its end.

Numbers in messages are those of the invariants in the reliability notes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pagedcore.request import FinishReason, Request
from pagedcore.step import Admission, Finished, Int32, StepOutput
from pagedcore.testing.hash_model import UInt64, draw, reference_tags, salt_of, score

End = tuple[FinishReason, int | None]


@dataclass(slots=True, eq=False)
class Tracked:
    """A live request: its tokens, and what the reference makes of them."""

    request: Request
    outputs: list[int]
    is_child: bool
    seed: int | None = None
    """Known from its first step on."""
    num_cached: int | None = None
    """Positions found in the cache when it was first admitted."""
    was_told_cached: bool = False
    num_scored: int = 0
    """Prompt log-probabilities handed out."""
    tags: list[UInt64] = field(default_factory=list)
    """[L] for each group: what the cache holds of its known tokens."""
    states: UInt64 = field(default_factory=lambda: np.empty(0, np.uint64))
    """[L] Last states of its known tokens."""

    @property
    def length(self) -> int:
        """Known tokens."""
        return len(self.request.prompt_token_ids) + len(self.outputs)

    def tokens(self) -> Int32:
        """Known tokens."""
        return np.array([*self.request.prompt_token_ids.tolist(), *self.outputs], np.int32)

    def compute(self, windows: Sequence[int | None]) -> None:
        """Let the reference look at all known tokens."""
        self.tags, self.states = reference_tags(self.tokens(), salt_of(self.request), windows)


class Oracle:
    """Follows live requests; raises AssertionError for anything that the reference does not say."""

    def __init__(
        self, windows: Sequence[int | None], *, block_size: int, vocab_size: int, longest: int
    ) -> None:
        self.live: dict[int, Tracked] = {}
        self.ended = dict.fromkeys(FinishReason, 0)
        """Requests that are over, by reason."""
        self.num_tokens = 0
        self.blocks: set[bytes] = set()
        """Contents of all full blocks that some request has had."""
        self._windows = windows
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._longest = longest

    def track(self, request: Request, outputs: Iterable[int], *, is_child: bool) -> None:
        """A request has arrived, or been forked from one with these outputs."""
        tracked = self.live[request.id] = Tracked(request, list(outputs), is_child)
        tracked.compute(self._windows)
        self._learn(tracked, 0)

    def forget(self, request_id: int, reason: FinishReason) -> None:
        """A request is over."""
        self.ended[reason] += 1
        del self.live[request_id]

    def _learn(self, tracked: Tracked, first: int) -> None:
        size = self._block_size
        for tags in tracked.tags:
            for index in range(first, tracked.length // size):
                self.blocks.add(tags[index * size : (index + 1) * size].tobytes())

    def take_admission(self, admission: Admission, num_computed: int | None) -> None:
        """A request has a row; `num_computed` is None when it runs nothing yet."""
        tracked = self.live[admission.request.id]
        tokens, known = admission.token_ids.tolist(), tracked.tokens().tolist()
        assert tokens == known, f"PRE-2: {tokens} are begun with, not {known}"
        if tracked.seed is None:
            tracked.seed = admission.seed
            asked = tracked.request.params.seed
            assert asked is None or asked == admission.seed, "30: another seed"
        assert tracked.seed == admission.seed, "30: the seed changed"
        if num_computed is None:
            return
        assert num_computed < tracked.length, "8: a hit covers the last token"
        if not tracked.is_child:
            assert num_computed % self._block_size == 0, "18: it begins in the middle of a block"
            if tracked.num_cached is None:
                tracked.num_cached = num_computed

    def take(self, output: StepOutput) -> list[Finished]:
        """What a step handed out; returns the endings that no token explains."""
        ended = {end.request_id: end for end in output.finished}
        ids = output.request_ids.tolist()
        assert len(ended) == len(output.finished), "17: a request ended twice"
        assert len(set(ids)) == len(ids), "29: two tokens of one request in a step"
        assert set(ids) <= self.live.keys(), "CANCEL-2: a token for somebody who has ended"
        self._take_cached(output, ids)
        self._take_logprobs(output, ids)
        for request_id, token in zip(ids, output.tokens.tolist(), strict=True):
            self._take_token(self.live[request_id], token, ended.pop(request_id, None))
        return list(ended.values())

    def _take_token(self, tracked: Tracked, token: int, end: Finished | None) -> None:
        request, state = tracked.request, int(tracked.states[-1])
        assert tracked.seed is not None, "a token before any step"
        expected = draw(state, request, tracked.seed, tracked.length, self._vocab_size)
        assert token == expected, f"29: request {request.id} got {token}, not {expected}"
        tracked.outputs.append(token)
        tracked.compute(self._windows)
        self._learn(tracked, max(0, tracked.length // self._block_size - 1))
        self.num_tokens += 1
        wanted = expected_end(request, tracked.outputs, self._longest)
        got = None if end is None else (end.reason, end.stop_reason)
        assert got == wanted, f"33: request {request.id} ended with {got}, not {wanted}"
        if end is not None:
            scores = request.params.prompt_logprobs is not None and not tracked.is_child
            missing = len(request.prompt_token_ids) - 1 - tracked.num_scored
            assert not scores or not missing, f"31: {missing} prompt tokens were not scored"
            self.forget(request.id, end.reason)

    def _take_cached(self, output: StepOutput, ids: list[int]) -> None:
        for request_id, count in output.num_cached_tokens.items():
            tracked = self.live[request_id]
            assert request_id in ids, "USAGE-3: cached tokens without a token"
            assert not tracked.was_told_cached, "USAGE-3: cached tokens told twice"
            assert count == tracked.num_cached, f"32: {count} cached, not {tracked.num_cached}"
            tracked.was_told_cached = True
        for request_id in ids:
            tracked = self.live[request_id]
            assert tracked.was_told_cached or tracked.is_child, "USAGE-3: cached tokens untold"

    def _take_logprobs(self, output: StepOutput, ids: list[int]) -> None:
        for request_id in ids:
            wanted = self.live[request_id].request.params.logprobs is not None
            assert (request_id in output.logprobs) == wanted, "STREAM-9: one entry per token"
        for request_id, entry in output.logprobs.items():
            assert request_id in ids, "ASYNC-3: a log-probability without a token"
            state = int(self.live[request_id].states[-1])
            expected = score(int(entry.token_ids[0]), state)
            assert entry.logprobs == expected.logprobs, "31: a log-probability is wrong"
        for request_id, entries in output.prompt_logprobs.items():
            tracked = self.live[request_id]
            prompt = tracked.request.prompt_token_ids.tolist()
            for entry in entries:
                at = tracked.num_scored
                expected = score(prompt[at + 1], int(tracked.states[at]))
                assert entry.token_ids == expected.token_ids, "31: a prompt token is skipped"
                assert entry.logprobs == expected.logprobs, "31: a prompt token's score is wrong"
                tracked.num_scored += 1


def expected_end(request: Request, outputs: list[int], longest: int) -> End | None:
    """STOP-1, written a second time."""
    params, last = request.params, outputs[-1]
    if last == request.eos_token_id and not params.ignore_eos:
        return FinishReason.STOP, None
    if last in params.stop_token_ids:
        return FinishReason.STOP, last
    full = len(request.prompt_token_ids) + len(outputs) >= longest
    if full or (params.max_tokens is not None and len(outputs) >= params.max_tokens):
        return FinishReason.LENGTH, None
    detection = params.repetition_detection
    if len(outputs) < params.min_tokens or detection is None:
        return None
    for size in range(detection.min_pattern_size, detection.max_pattern_size + 1):
        pattern, rest, count = outputs[-size:], list(outputs), 0
        while len(rest) >= size and rest[-size:] == pattern:
            rest, count = rest[:-size], count + 1
        if count >= detection.min_count:
            return FinishReason.REPETITION, None
    return None
