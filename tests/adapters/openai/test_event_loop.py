"""The loop of a server takes in many connections in a turn, and outlives what it cannot take."""

import asyncio
import errno
import os
import socket
from contextlib import ExitStack, closing

import pytest

from pagedcore_openai import event_loop
from pagedcore_openai.event_loop import FEW, Listener, ServingLoop


class Counting(asyncio.Protocol):
    """Counts connections."""

    made = 0

    def connection_made(self, transport):
        type(self).made += 1
        transport.close()


@pytest.fixture
def protocol():
    return type("Protocol", (Counting,), {"made": 0})


def run(main):
    with asyncio.Runner(loop_factory=ServingLoop) as runner:
        return runner.run(main())


def knock(stack, address, count):
    for _ in range(count):
        stack.enter_context(socket.create_connection(address))


def test_many_connections_are_taken_in_each_turn(protocol):  # A7
    count = 10 * FEW

    async def main():
        loop = asyncio.get_running_loop()
        sock = socket.create_server(("127.0.0.1", 0), backlog=2 * count)
        server = await loop.create_server(protocol, sock=sock, backlog=2 * count)
        num_turns = 0
        with closing(server), ExitStack() as stack:
            knock(stack, server.sockets[0].getsockname(), count)
            while protocol.made < count:
                await asyncio.sleep(0)
                num_turns += 1
        assert sock.fileno() == -1
        return num_turns

    assert run(main) < count // 2


class Exhausted:
    """A listening socket that may have no more connections, once."""

    def __init__(self, sock):
        self._sock = sock
        self._left = 1

    def __getattr__(self, name):
        return getattr(self._sock, name)

    def accept(self):
        if self._left:
            self._left -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._sock.accept()


def test_where_the_process_may_have_no_more_it_waits_and_goes_on(protocol, monkeypatch, caplog):
    monkeypatch.setattr(event_loop, "PAUSE_S", 0.01)  # R15

    async def main():
        sock = socket.create_server(("127.0.0.1", 0))
        listener = Listener(asyncio.get_running_loop(), protocol, Exhausted(sock), None, 100)
        with closing(listener), ExitStack() as stack:
            knock(stack, sock.getsockname(), 3)
            while protocol.made < 3:
                await asyncio.sleep(0)

    run(main)
    assert caplog.messages == ["no connection can be taken now: Too many open files"]
