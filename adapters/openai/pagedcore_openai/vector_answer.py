"""The vectors of one request's prompts: sent to the engine a few at a time, returned in order."""

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pagedcore.engine.client import EngineClient
from pagedcore.errors import EngineDeadError
from pagedcore.pooling import PoolingParams
from pagedcore.text.inputs import PooledInput
from pagedcore_openai.counters import Slot
from pagedcore_openai.errors import ApiError, as_api_error
from pagedcore_openai.timing import now

Vector = NDArray[np.float32]

MAX_AWAITED_BYTES = 8 << 20
"""Of vectors that a front end waits for: an engine drops one that leaves more unread."""


class Room:
    """How many vectors a front end may wait for, in all and for one request."""

    def __init__(self, client: EngineClient) -> None:
        """Nothing is asked of `client` before the first `of_request`."""
        self._client = client
        self._in_all: asyncio.Semaphore | None = None
        self._most = 0

    def of_request(self) -> tuple[asyncio.Semaphore, asyncio.Semaphore]:
        """Room in all, and a request's own: enough that the engine never waits for one request,
        and half of it all, so that nobody waits for the end of another's.
        """
        if self._in_all is None:
            info = self._client.info
            self._most = max(2, MAX_AWAITED_BYTES // (4 * max(info.pooling.size, 1)))
            self._in_all = asyncio.Semaphore(self._most)
        own = min(2 * self._client.info.max_num_seqs, self._most // 2)
        return self._in_all, asyncio.Semaphore(own)


class VectorAnswer:
    """Runs the prompts of one request; leaving `whole` early aborts what has not ended."""

    def __init__(
        self,
        client: EngineClient,
        items: Sequence[tuple[PooledInput, PoolingParams]],
        *,
        priority: int,
        cache_salt: str | None,
        deadline: float | None,
        arrival: float,
        slot: Slot,
        room: Room,
    ) -> None:
        """Prepare; `deadline` and `arrival` are in the event loop's time."""
        self.num_prompt_tokens = sum(len(item.prompt_token_ids) for item, _ in items)
        self.num_cached_tokens = 0
        self._client = client
        self._items = items
        self._priority = priority
        self._cache_salt = cache_salt
        self._deadline = deadline
        self._arrival = arrival
        self._slot = slot
        self._in_all, self._own = room.of_request()

    async def whole(self) -> list[Vector]:
        """The vector or the scores of each prompt, in order.

        Raises what the engine refuses a prompt with, ApiError 408 after the deadline, and ApiError
        500 where the engine fails on one; the others are given up then.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._one(*item)) for item in self._items]
        except TimeoutError:
            raise ApiError(
                408,
                "the vectors were not complete within the x-request-timeout that was asked for",
                "x-request-timeout",
                headers={"x-should-retry": "false"},  # OpenAI's clients would ask again
            ) from None
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _one(self, item: PooledInput, pooling: PoolingParams) -> Vector:
        async with self._own, self._in_all:
            generation = self._client.pool(
                item.prompt_token_ids,
                pooling,
                priority=self._priority,
                cache_salt=self._cache_salt,
            )
            async with generation:
                await generation.admitted()
                try:
                    async for chunk in generation:
                        if chunk.vector is None:
                            message = chunk.message or "the engine failed on this request"
                            raise ApiError(500, message)
                        num_cached = chunk.num_cached_tokens or 0
                        self._count(len(item.prompt_token_ids), num_cached, chunk.queue_seconds)
                        return chunk.vector
                except EngineDeadError as error:
                    raise as_api_error(error, admitted=True) from error
        raise ApiError(500, "the engine gave no vector")

    def _count(self, num_tokens: int, num_cached: int, queue_seconds: float | None) -> None:
        self.num_cached_tokens += num_cached
        observe = self._slot.observe
        observe("request_prompt_tokens", num_tokens)
        observe("request_prefill_kv_computed_tokens", num_tokens - num_cached)
        observe("e2e_request_latency_seconds", now() - self._arrival)
        if queue_seconds is not None:
            observe("request_queue_time_seconds", queue_seconds)
