"""Send requests to a server when their time has come, and wait until it is there."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from pagedcore.cli.bench.client import Outcome, Server, ServerError
from pagedcore.cli.bench.report import progress
from pagedcore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sending:
    """One request that is going to be sent."""

    body: Mapping[str, Any]
    due: float
    """Seconds after the start."""


async def wait_for_model(server: Server, timeout_s: float) -> str:
    """The first model that a server lists, as soon as it does.

    Raises ConfigError where it does not within `timeout_s` seconds; 0 asks once.
    """
    pause, gives_up = 0.05, time.perf_counter() + timeout_s
    while True:
        try:
            return await server.model()
        except (OSError, ServerError) as error:
            if time.perf_counter() + pause > gives_up:
                raise ConfigError(
                    f"cannot ask {server.base_url} for its models: {error}; to wait for a server "
                    "that starts, give --ready-check-timeout-sec"
                ) from None
        await asyncio.sleep(pause)
        pause = min(2 * pause, 1.0)


async def drive(
    server: Server, path: str, sendings: Sequence[Sending], *, num_warmups: int, most: int | None
) -> tuple[list[Outcome], float]:
    """Send all requests, at most `most` at a time: their outcomes, and seconds of it all.

    `num_warmups` of them are sent before, one after the other, and not counted. Raises ConfigError
    where one of these fails.
    """
    for sending in sendings[:num_warmups]:
        outcome = await server.stream(path, sending.body)
        if outcome.error is not None:
            raise ConfigError(f"the first request to {server.base_url} failed: {outcome.error}")
    limit = nullcontext() if most is None else asyncio.Semaphore(most)
    with progress() as bar:
        task = bar.add_task("requests", total=len(sendings))

        async def send(body: Mapping[str, Any]) -> Outcome:
            async with limit:
                outcome = await server.stream(path, body)
            bar.advance(task)
            return outcome

        started = time.perf_counter()
        running = []
        for sending in sendings:
            await asyncio.sleep(max(0.0, started + sending.due - time.perf_counter()))
            running.append(asyncio.create_task(send(sending.body)))
        outcomes = await asyncio.gather(*running)
        return outcomes, time.perf_counter() - started
