"""Puts the engine's metrics on Triton's own metrics port, through our stub in Triton.

The page is the surface's. Triton has no histograms whose buckets can be set, so their series go
there as counters: what Prometheus computes from them is the same.
"""

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from pagedcore.engine.client import EngineClient
from pagedcore.errors import PagedcoreError
from pagedcore_openai.counters import Counters
from pagedcore_openai.metrics import exposition

logger = logging.getLogger(__name__)

METRICS_SOCKET = "{}-metrics.sock"
"""By the model's name; the same as in `stub_model.py`, which cannot be imported here."""

PUSH_S = 1.0
"""Seconds between two messages."""

_SERIES_PER_MESSAGE = 100


class MetricsPusher:
    """Asks the engine and tells the stub, from a thread; a context manager."""

    def __init__(
        self, address: str, socket_path: Path, counters: Counters, alias: str | None
    ) -> None:
        """`address` is the engine's socket, `socket_path` the stub's."""
        self._address = address
        self._socket_path = str(socket_path)
        self._counters = counters
        self._alias = alias
        self._over: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pagedcore-metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._begun.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._loop is not None
        assert self._over is not None
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._push())

    async def _push(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._begun.set()
        client = EngineClient(self._address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as link:
            while not self._over.is_set():
                with contextlib.suppress(PagedcoreError, TimeoutError):
                    stats = await client.call("stats")
                    engine = (client.info, stats, self._counters)
                    self._send(link, exposition([engine], alias=self._alias).decode())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), PUSH_S)
        await client.close()

    def _send(self, link: socket.socket, page: str) -> None:
        series = list(_series(page))
        for begin in range(0, len(series), _SERIES_PER_MESSAGE):
            message = json.dumps(series[begin : begin + _SERIES_PER_MESSAGE]).encode()
            # The model is being loaded, or the stub is behind: the next message has it all.
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                link.sendto(message, self._socket_path)


def _series(page: str) -> Iterator[tuple[str, str, str, dict[str, str], Any]]:
    """Each series of a page: name, kind, help, labels and value."""
    for family in text_string_to_metric_families(page):
        kind = "gauge" if family.type == "gauge" else "counter"
        for sample in family.samples:
            yield sample.name, kind, family.documentation, sample.labels, sample.value
