"""What `mounts.py` does to a mount besides load: readers that leave, dead engines, signals."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from mount_load import OPENAI, TRITON, all_first_tokens, open_streams
from mount_server import MountServer

WAIT_S = 30
ENDLESS = 1 << 19


def doors_of(server):
    """Each door of a mount and its port."""
    doors = [(OPENAI, server.port)]
    return [*doors, (TRITON, server.port + 1)] if server.mount == "pytriton" else doors


async def _streams_at_all_doors(server, count, num_tokens):
    doors = doors_of(server)
    begun = [
        await open_streams(door, port, count // len(doors), num_tokens) for door, port in doors
    ]
    streams = [stream for some in begun for stream in some]
    await all_first_tokens(streams)
    return streams


async def _not_ready(server):
    """Seconds until /readyz is no 200 any more."""
    started = time.perf_counter()
    while await asyncio.to_thread(server.ready) == 200:
        if time.perf_counter() - started > WAIT_S:
            return float("inf")
    return time.perf_counter() - started


async def _all_ended(streams, since):
    """Seconds from `since` until the last stream has ended, and how many never did."""
    waiting = [over for _, over, _ in streams]
    done, open_ones = await asyncio.wait(waiting, timeout=WAIT_S)
    ends = [stream.ended - since for stream, over, _ in streams if over in done]
    return max(ends, default=float("inf")), len(open_ones)


def leave(mount, tries):
    """A8: milliseconds from a reader's disconnect to the abort, of the slowest of some tries."""

    async def measure(server):
        slowest = 0.0
        for door, port in doors_of(server):
            for _ in range(tries):
                known = len(server.aborts())
                streams = await open_streams(door, port, 1, ENDLESS)
                await all_first_tokens(streams)
                left = time.monotonic()
                streams[0][2].abort()
                while len(server.aborts()) == known:
                    await asyncio.sleep(0.002)
                    if time.monotonic() - left > WAIT_S:
                        return float("inf")
                slowest = max(slowest, server.aborts()[-1][0] - left)
        return slowest

    with MountServer(mount) as server:
        return {"abort_ms": 1000 * asyncio.run(measure(server))}


def kill_engine(mount, count):
    """A9, A11: the engine is killed under open streams."""

    async def measure(server):
        streams = await _streams_at_all_doors(server, count, ENDLESS)
        killed = time.perf_counter()
        os.kill(server.engine_pid(), signal.SIGKILL)
        (ended, silent), unready = await asyncio.gather(
            _all_ended(streams, killed), _not_ready(server)
        )
        told = sum(stream.has_error for stream, _, _ in streams)
        return killed, {
            "asked": len(streams),
            "streams_told_s": ended,
            "streams_silent": silent,
            "streams_with_error_event": told,
            "unready_s": unready,
        }

    with MountServer(mount) as server:
        killed, result = asyncio.run(measure(server))
        if mount == "pytriton":
            result["exit_status"] = server.process.wait(60)
            result["ended_s"] = time.perf_counter() - killed
        else:
            server.wait_for(200, 60)
            result["serving_again_s"] = time.perf_counter() - killed
        return result


def stop_engine(mount, count):
    """A10: the engine is stopped under open streams, and goes on later."""

    async def measure(server):
        streams = await _streams_at_all_doors(server, count, ENDLESS)
        stopped = time.perf_counter()
        os.kill(server.engine_pid(), signal.SIGSTOP)
        (ended, silent), unready = await asyncio.gather(
            _all_ended(streams, stopped), _not_ready(server)
        )
        os.kill(server.engine_pid(), signal.SIGCONT)
        going_on = time.perf_counter()
        while len(server.aborts()) < count and time.perf_counter() - going_on < WAIT_S:
            await asyncio.sleep(0.05)
        orphans = count - len(server.aborts())
        return {
            "streams_told_s": ended,
            "streams_silent": silent,
            "unready_s": unready,
            "orphans": orphans,
        }

    with MountServer(mount) as server:
        return asyncio.run(measure(server))


def terminate(mount, count, num_tokens):
    """A12, A13: SIGTERM under open streams, and what is left afterwards."""

    async def measure(server):
        streams = await _streams_at_all_doors(server, count, num_tokens)
        server.process.terminate()
        await _not_ready(server)
        refusals = [await asyncio.to_thread(_ask, door, port) for door, port in doors_of(server)]
        await _all_ended(streams, time.perf_counter())
        finished = 0
        for stream, _, _ in streams:
            with contextlib.suppress(ValueError):
                finished += len(stream.text) == num_tokens
        return {"finished": finished, "asked": len(streams), "refusals": refusals}

    with MountServer(mount, shutdown_timeout=60) as server:
        result = asyncio.run(measure(server))
        result["exit_status"] = server.process.wait(60)
        result["left"] = server.left()
    with MountServer(mount) as server:
        started = time.perf_counter()
        server.process.terminate()
        server.process.wait(60)
        result["idle_stop_s"] = time.perf_counter() - started
        result["left"] += server.left()
    return result


def _ask(door, port):
    """The status of one more request while the server drains."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    body = {"prompt": "a", "max_tokens": 1}
    path = "/v1/completions"
    if door == TRITON:
        body, path = {"text_input": "a", "max_tokens": 1}, "/v2/models/fake/generate"
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        return [answer.status, answer.getheader("retry-after")]


def sdk_checks(mount):
    """A14: the surface's suite against this mount, most of it through the official client."""
    face = {"bare": "asgi"}.get(mount, mount)
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/surface"]
    run = subprocess.run(
        [*command, "-k", face], capture_output=True, text=True, cwd=root, check=False
    )
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error)", run.stdout)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return {"passed": counts.get("passed", 0), "failed": failed}
