"""When the tokens of a request came, and what its histograms are told of it (METRIC-6)."""

import time

from pagedcore.request import SamplingParams
from pagedcore_openai.counters import Slot

now = time.monotonic
"""The clock of all times here, and of event loops."""


class RequestTiming:
    """Times of the choices of one prompt."""

    def __init__(
        self, slot: Slot, params: SamplingParams, num_prompt_tokens: int, arrival: float
    ) -> None:
        """`arrival` is when the request came, by the clock `now`."""
        self._slot = slot
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._arrival = arrival
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._counts = [0] * params.n
        self._num_ended = 0
        self._sent = arrival
        self._scheduled: float | None = None
        self.queue_seconds: float | None = None
        """How long the prompt waited in the engine, once that is known."""

    @property
    def scheduled_at(self) -> float | None:
        """When the prompt was first scheduled."""
        return self._scheduled

    @property
    def first_at(self) -> float | None:
        """When the first token of any choice came."""
        return min(self._first.values(), default=None)

    @property
    def last_at(self) -> float | None:
        """When the last token until now came."""
        return max(self._last.values(), default=None)

    def sent(self) -> None:
        """The engine is being asked."""
        self._sent = now()

    def scheduled(self, queue_seconds: float) -> None:
        """The engine tells how long the prompt waited there."""
        self.queue_seconds = queue_seconds
        self._scheduled = self._sent + queue_seconds
        for _ in range(self._params.n):
            self._slot.observe("request_queue_time_seconds", queue_seconds)

    def took(self, choice: int, num_tokens: int, at: float) -> None:
        """Some tokens of a choice have come, at `at`."""
        self._counts[choice] += num_tokens
        last = self._last.get(choice)
        if last is None:
            self._first[choice] = at
            self._slot.observe("time_to_first_token_seconds", at - self._arrival)
        else:
            self._slot.observe("inter_token_latency_seconds", at - last)
        self._last[choice] = at

    def ended(self, choice: int, num_cached_tokens: int) -> None:
        """A choice is over: tell its histograms, and after the last one those of the prompt."""
        observe = self._slot.observe
        count = self._counts[choice]
        observe("request_prompt_tokens", self._num_prompt_tokens)
        observe("request_generation_tokens", count)
        observe("request_params_max_tokens", self._params.max_tokens or 0)
        observe("request_prefill_kv_computed_tokens", self._num_prompt_tokens - num_cached_tokens)
        if count:
            decoding = self._last[choice] - self._first[choice]
            observe("e2e_request_latency_seconds", self._last[choice] - self._arrival)
            observe("request_decode_time_seconds", decoding)
            if self._scheduled is not None:
                until_first = max(0.0, self._first[choice] - self._scheduled)
                observe("request_prefill_time_seconds", until_first)
                observe("request_inference_time_seconds", until_first + decoding)
            if count > 1:
                observe("request_time_per_output_token_seconds", decoding / (count - 1))
        self._num_ended += 1
        if self._num_ended == self._params.n:
            observe("request_params_n", self._params.n)
            observe("request_max_num_generation_tokens", max(self._counts))
