"""An engine that dies is started again, and one that dies for ever is not."""

import asyncio
import contextlib
import os
import signal

import pytest

from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.errors import ConfigError, EngineDeadError
from pagedcore.testing.fake_engine import BUILD_FAKE
from pagedcore_openai.supervisor import MAX_DEATHS, Supervisor


def supervised(use, **options):
    async def main():
        supervisor = Supervisor(EngineConfig.from_options(**options), build=BUILD_FAKE)
        try:
            await asyncio.wait_for(supervisor.wait_ready(), 60)
            keeper = asyncio.create_task(supervisor.keep_alive())
            try:
                await asyncio.wait_for(use(supervisor, keeper), 120)
            finally:
                keeper.cancel()
        finally:
            await asyncio.to_thread(supervisor.close)

    asyncio.run(main())


def test_front_ends_find_a_new_engine_at_the_old_address():
    async def use(supervisor, keeper):
        client = EngineClient(supervisor.address)
        await client.wait_ready()
        first = supervisor.process.pid
        os.kill(first, signal.SIGKILL)
        while True:
            with contextlib.suppress(EngineDeadError, TimeoutError):
                await client.wait_ready()
                if supervisor.process.pid != first:
                    await client.call("ping")
                    break
            await asyncio.sleep(0)
        await client.close()

    supervised(use)


def test_an_engine_that_dies_again_and_again_is_given_up():
    async def use(supervisor, keeper):
        for _ in range(MAX_DEATHS + 1):
            pid = supervisor.process.pid
            os.kill(pid, signal.SIGKILL)
            while supervisor.process.pid == pid and not keeper.done():
                await asyncio.sleep(0)
            if not keeper.done():
                await supervisor.wait_ready()
        with pytest.raises(EngineDeadError, match="not started again"):
            await keeper

    supervised(use)


def test_an_engine_that_cannot_start_is_not_tried_again():
    with pytest.raises(ConfigError, match="cannot run anything"):
        supervised(lambda supervisor, keeper: keeper, device="none")
