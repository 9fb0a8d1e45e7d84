"""The front end's side: bounded, cancellable, and unimpressed by a server that misbehaves."""

import asyncio
import threading

import numpy as np
import pytest

from pagedcore.engine import wire
from pagedcore.engine.client import EngineClient
from pagedcore.errors import EngineDeadError, OverloadedError, RequestError
from pagedcore.request import SamplingParams
from pagedcore.testing.fake_engine import FakeEngine


async def gone(engine):
    await asyncio.to_thread(engine.wait_for, lambda engine: not engine.live_ids)


def test_a_reader_that_falls_behind_is_told_and_its_request_aborted(serve, run):
    engine = serve(FakeEngine(max_model_len=1 << 30)).engine
    overflowed = threading.Event()

    async def use(client):
        params = SamplingParams(max_tokens=None)
        gen = client.generate([1], params, on_overflow=overflowed.set)
        await gen.admitted()
        await gone(engine)
        assert overflowed.is_set()
        with pytest.raises(OverloadedError, match="more than 100 tokens") as caught:
            async for _ in gen:
                pass
        assert caught.value.reason == "slow_reader"

    run(use, max_queued_tokens=100)


def test_too_many_sequences_in_flight_are_refused_here(serve, run, paused):
    engine = serve().engine

    async def use(client):
        with paused(engine):
            await client.generate([1], SamplingParams(n=3)).admitted()
            with pytest.raises(OverloadedError, match="3 sequences") as caught:
                await client.generate([1], SamplingParams(n=2)).admitted()
            assert caught.value.reason == "queued_reqs"
            await client.generate([1], SamplingParams()).admitted()
        assert engine.num_added == 4

    run(use, max_inflight=4)


def test_cancelling_a_reader_aborts_its_request(serve, run, paused):
    engine = serve().engine

    async def use(client):
        async def read():
            async for _ in client.generate([1], SamplingParams(max_tokens=4000, n=4)):
                pass

        with paused(engine):
            task = asyncio.create_task(read())
            await asyncio.to_thread(engine.wait_for, lambda engine: len(engine.live_ids) == 4)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await gone(engine)

    run(use)


def test_cancelling_while_waiting_for_admission_aborts_too(serve, run):
    engine = serve().engine

    async def use(client):
        engine.hold()
        blocker = client.generate([1], SamplingParams(max_tokens=1))
        await blocker.admitted()
        task = asyncio.create_task(client.generate([1], SamplingParams()).admitted())
        await client.call("ping")  # the request is on its way by now
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.release()
        await gone(engine)
        blocker.close()
        assert client.num_inflight == 0

    run(use)


@pytest.mark.parametrize(
    "prompt",
    [[2**31], [2**64], [-(2**31) - 1], [1.5], ["a"], [True], [[1], [2, 3]], [[1]], 5, None],
)
def test_token_ids_that_are_none_are_refused_before_anything_is_sent(prompt, address):
    with pytest.raises(RequestError, match="32-bit integer"):
        EngineClient(address).generate(prompt, SamplingParams())


def test_a_client_belongs_to_one_event_loop(serve, address):
    serve()
    client = EngineClient(address)

    async def begin():
        await client.start()

    asyncio.run(begin())
    with pytest.raises(RuntimeError, match="event loop"):
        asyncio.run(begin())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (b"\x05\0\0\0hello", "could not be understood"),
        (wire.encode(wire.Malformed("what?")) + wire.encode(wire.Dead("tired")), "tired"),
        (wire.encode(wire.Welcome(99, "", 1, FakeEngine().info)), "version 99"),
    ],
)
def test_a_server_that_misbehaves_counts_as_dead(address, caplog, words, says):
    class Impostor(asyncio.Protocol):
        """Welcomes, and has nothing sensible to say."""

        def connection_made(self, transport):
            self.transport = transport
            transport.write(wire.encode(wire.Welcome(wire.VERSION, "", 1, FakeEngine().info)))

        def data_received(self, data):
            if b"add" in data:
                self.transport.write(words)

    async def main():
        server = await asyncio.get_running_loop().create_unix_server(Impostor, address)
        client = EngineClient(address)
        with pytest.raises(EngineDeadError, match=says):
            await client.generate([1], SamplingParams()).admitted()
        assert client.num_inflight == 0
        await client.close()
        server.close()

    asyncio.run(main())


def test_gathered_tokens_come_joined(serve, run):
    serve()

    async def use(client):
        async with client.generate(np.array([1, 2], np.int32), SamplingParams(max_tokens=9)) as gen:
            await gen.admitted()
            while (await client.call("stats"))["num_requests_running"]:
                pass
            chunks = [chunk async for chunk in gen]
        assert [chunk.token_ids for chunk in chunks] == [[1, 2, 1, 2, 1, 2, 1, 2, 1]]

    run(use)
