"""Keeps an engine process alive: one that dies is started again at the same address."""

import asyncio
import logging
import os
import time
from collections import deque

from pagedcore.config import EngineConfig
from pagedcore.engine.info import EngineInfo
from pagedcore.engine.process import BUILD, EngineProcess
from pagedcore.errors import EngineDeadError

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Deaths within `WINDOW_S` after which an engine is not started again: it would die for ever."""

WINDOW_S = 600.0


class Supervisor:
    """Owns an engine process, and what replaces it."""

    def __init__(self, config: EngineConfig, *, build: str = BUILD) -> None:
        """Start an engine; see `EngineProcess`."""
        self._config = config
        self._build = build
        self.process = EngineProcess(config, build=build)
        """The one that runs now."""
        self.address = self.process.address
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)

    async def wait_ready(self) -> EngineInfo:
        """Wait until the engine is loaded; raises as `EngineProcess.wait_ready` does."""
        return await asyncio.to_thread(self.process.wait_ready)

    async def keep_alive(self) -> None:
        """Start a new engine whenever the one that runs has ended; for ever.

        Front ends reconnect by themselves. Raises EngineDeadError for an engine that dies again
        and again, and what a new one's start fails with.
        """
        while True:
            await _ended(self.process.pid)
            status = await asyncio.to_thread(self.process.wait)
            now = time.monotonic()
            if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < WINDOW_S:
                raise EngineDeadError(
                    f"the engine has ended {MAX_DEATHS + 1} times within {WINDOW_S:g} s, the last "
                    f"time with exit status {status}: it is not started again"
                )
            self._deaths.append(now)
            logger.error("the engine has ended with exit status %d; it is started again", status)
            await asyncio.to_thread(self.process.stop)  # which clears away what it left
            self.process = EngineProcess(
                self._config, address=self.address, owns_folder=True, build=self._build
            )
            await self.wait_ready()
            logger.info("the engine is ready again")

    def close(self) -> None:
        """End the engine; see `EngineProcess.stop`."""
        self.process.stop()


async def _ended(pid: int) -> None:
    """Wait until a child has ended; it is not waited for, so its id stays its own."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    over = asyncio.Event()
    loop.add_reader(descriptor, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
