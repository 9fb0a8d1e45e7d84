"""How many vectors a front end waits for at a time: its engine drops one that reads too late."""

import asyncio
from types import SimpleNamespace

import pytest

from pagedcore.pooling import PoolingInfo
from pagedcore_openai.vector_answer import MAX_AWAITED_BYTES, Room


def room_of(size, max_num_seqs):
    info = SimpleNamespace(max_num_seqs=max_num_seqs, pooling=PoolingInfo(size=size))
    return Room(SimpleNamespace(info=info))


def free_places(semaphore):
    async def count():
        places = 0
        while not semaphore.locked():
            await semaphore.acquire()
            places += 1
        return places

    return asyncio.run(count())


@pytest.mark.parametrize("size", [0, 384, 4096, 1 << 20, 1 << 26])
def test_what_is_awaited_in_all_is_bounded_and_no_request_has_all_of_it(size):
    in_all, own = room_of(size, 256).of_request()
    own_places = free_places(own)
    assert 1 <= own_places <= 2 * 256
    if size > 384:
        total = free_places(in_all)
        assert own_places <= total // 2
        assert total == 2 or total * size * 4 <= MAX_AWAITED_BYTES


def test_requests_share_what_there_is_in_all():
    room = room_of(4096, 256)
    first, second = room.of_request(), room.of_request()
    assert first[0] is second[0]
    assert first[1] is not second[1]
