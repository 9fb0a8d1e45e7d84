"""An engine in a child process starts, says why it cannot, and never outlives its parent."""

import asyncio
import os
import select
import signal
import stat
import subprocess
import sys
import textwrap

import pytest

from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.engine.process import EngineProcess
from pagedcore.errors import ConfigError, EngineDeadError
from pagedcore.request import SamplingParams
from pagedcore.testing.fake_engine import BUILD_FAKE


def start(build=BUILD_FAKE, **options):
    return EngineProcess(EngineConfig.from_options(**options), build=build)


def wait_for_end(pid):
    """Wait until a process that is not our child has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([fd], [], [], 30)[0], "the process lives on"
    os.close(fd)


def test_an_engine_in_a_child_serves_and_leaves_nothing_behind():
    with start(model="some-model", max_model_len=77) as process:
        info = process.wait_ready(60)
        assert (info.model, info.max_model_len) == ("some-model", 77)
        folder = os.path.dirname(process.address)
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700

        async def main():
            client = EngineClient(process.address)
            async with client.generate([4, 5], SamplingParams(max_tokens=3)) as gen:
                tokens = [token async for chunk in gen for token in chunk.token_ids]
            await client.close()
            return tokens

        assert asyncio.run(main()) == [4, 5, 4]
    assert process.wait() == 0
    assert not process.alive
    assert not os.path.exists(folder)
    process.stop()


def test_a_start_that_fails_raises_here_what_it_raised_there():
    with start(device="none") as process:
        for _ in range(2):
            with pytest.raises(ConfigError, match="'none' cannot run anything: choose another"):
                process.wait_ready(60)
        assert process.wait(30) == 1


def test_an_unexpected_end_of_the_start_is_told_in_one_line(capfd):
    says = pytest.raises(EngineDeadError, match="cannot start: ModuleNotFoundError: No module")
    with start("no_such_module:build") as process, says:
        process.wait_ready(60)
    assert "Traceback" in capfd.readouterr().err


def test_an_engine_that_is_killed_while_it_loads_is_no_riddle():
    with start() as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="ended with signal 9 before it was ready"):
            process.wait_ready(60)


def test_waiting_for_an_engine_can_be_given_up_and_taken_up_again():
    with start() as process:
        with pytest.raises(TimeoutError):
            process.wait_ready(0)
        assert process.wait_ready(60).model


def test_a_killed_engine_ends_streams_at_once():
    with start(max_model_len=10**9) as process:
        process.wait_ready(60)

        async def main():
            client = EngineClient(process.address)
            gen = client.generate([1], SamplingParams(max_tokens=None))
            await gen.admitted()
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="has ended"):
                await asyncio.wait_for(_drain(gen), 2)
            await client.close()

        asyncio.run(main())
        assert process.wait(30) == -signal.SIGKILL


def test_a_stopped_engine_ends_streams_within_seconds_and_works_for_nobody_afterwards(monkeypatch):
    monkeypatch.setattr("pagedcore.engine.link.BEAT_S", 0.05)
    with start(max_model_len=10**9) as process:
        process.wait_ready(60)

        async def main():
            client = EngineClient(process.address)
            await client.wait_ready()
            os.kill(process.pid, signal.SIGSTOP)
            gen = client.generate([1], SamplingParams(max_tokens=None))
            with pytest.raises(EngineDeadError, match="does not answer"):
                await asyncio.wait_for(gen.admitted(), 10)
            os.kill(process.pid, signal.SIGCONT)
            await asyncio.wait_for(client.wait_ready(), 30)
            while (await client.call("stats"))["num_requests_running"]:
                pass
            await client.close()

        asyncio.run(main())


async def _drain(generation):
    async for _ in generation:
        pass


def test_signals_for_the_group_leave_the_engine_to_its_parent():
    with start() as process:
        process.wait_ready(60)
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)

        async def main():
            client = EngineClient(process.address)
            await client.start()
            await client.call("ping")
            await client.close()

        asyncio.run(main())
        assert process.alive


PARENT = """
    import os, sys
    from pagedcore.config import EngineConfig
    from pagedcore.engine.process import EngineProcess

    process = EngineProcess(EngineConfig(), build={build!r})
    if {die}:
        print(process.pid, process.address, flush=True)
        process.wait_ready(60)
        os.kill(os.getpid(), 9)
    if {ready}:
        process.wait_ready(60)
    if {fork} and os.fork() == 0:  # holds the death pipe open
        sys.stdin.read()
        os._exit(0)
    print(process.pid, process.address, flush=True)
    if {wait}:
        sys.stdin.readline()
"""


def parent(**given):
    how = {"build": BUILD_FAKE, "ready": True, "fork": False, "wait": True, "die": False}
    how |= given
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT).format(**how)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with-a-fork"])
def test_an_engine_ends_with_a_killed_parent_and_removes_its_socket(fork):
    with parent(fork=fork) as program:
        pid, address = program.stdout.readline().split()
        program.kill()
        wait_for_end(int(pid))
        assert not os.path.exists(os.path.dirname(address))


def test_a_parent_that_is_killed_the_moment_its_engine_is_ready_leaves_no_socket():
    with parent(die=True) as program:
        pid, address = program.stdout.readline().split()
        wait_for_end(int(pid))
        assert not os.path.exists(os.path.dirname(address))


def test_an_engine_that_still_loads_ends_with_its_parent():
    with parent(ready=False) as program:
        pid, _ = program.stdout.readline().split()
        program.kill()
        wait_for_end(int(pid))


def test_a_program_that_forgets_to_stop_its_engine_leaves_nothing_behind():
    with parent(wait=False) as program:
        pid, address = program.stdout.readline().split()
        assert program.wait(30) == 0
        wait_for_end(int(pid))
        assert not os.path.exists(os.path.dirname(address))
