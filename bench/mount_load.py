"""The client of `mounts.py`: many streams at once, cheaply, and what their readers saw.

It looks at bytes while the streams run, and at their meaning only afterwards: the client shares
its cores with the server that is measured.
"""

import asyncio
import contextlib
import json
import statistics
import string
import time
from dataclasses import dataclass

PROMPT = string.ascii_letters + "!?"
"""64 tokens, all different and repeated by the stand-in: a lost or doubled one shows."""

OPENAI, TRITON = "openai", "triton"


def request_bytes(door, port, num_tokens):
    """A whole HTTP request for one stream."""
    if door == OPENAI:
        path = "/v1/completions"
        body = {"prompt": PROMPT, "max_tokens": num_tokens, "stream": True}
    else:
        path = "/v2/models/fake/generate_stream"
        body = {"text_input": PROMPT, "max_tokens": num_tokens, "stream": True}
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


@dataclass
class Stream:
    """What came over one connection."""

    begun: float
    first: float | None = None
    last: float = 0.0
    ended: float | None = None
    status: bytes = b""

    def __post_init__(self):
        self.pieces = []
        self.gaps = []

    @property
    def text(self):
        """The text of all events; raises ValueError for an error or an end without a reason."""
        texts, reason = [], None
        for event in self.events():
            if "error" in event:
                raise ValueError(event["error"])
            if "choices" in event:
                (choice,) = event["choices"] or [{"text": "", "finish_reason": None}]
                texts.append(choice["text"])
                reason = choice["finish_reason"] or reason
            else:
                texts.append(event["text_output"])
                reason = event.get("finish_reason") or reason
        if reason != "length":
            raise ValueError(f"the stream ended with {reason}")
        return "".join(texts)

    def events(self):
        """The JSON of all events so far."""
        data = b"".join(self.pieces)
        start = data.find(b"\r\n\r\n") + 4
        body = _without_chunks(data[start:]) if b"chunked" in data[:start].lower() else data[start:]
        for line in body.split(b"\n"):
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])

    @property
    def has_error(self):
        return any("error" in event for event in self.events())


def _without_chunks(data):
    """A chunked body's content, as far as it goes."""
    content = []
    while data:
        size, _, rest = data.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length:
            break
        content.append(rest[:length])
        data = rest[length + 2 :]
    return b"".join(content)


class _Reader(asyncio.Protocol):
    def __init__(self, stream, request, over):
        self._stream = stream
        self._request = request
        self._over = over
        self._tail = b""

    def connection_made(self, transport):
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data):
        now = time.perf_counter()
        stream = self._stream
        stream.pieces.append(data)
        seen = self._tail + data
        if b"data: {" in seen:
            if stream.first is None:
                stream.first = now
            else:
                stream.gaps.append(now - stream.last)
            stream.last = now
        self._tail = data[-6:]
        if data.endswith(b"0\r\n\r\n"):
            self._transport.close()

    def connection_lost(self, error):
        if self._stream.ended is None:
            self._stream.ended = time.perf_counter()
        if not self._over.done():
            self._over.set_result(None)


async def open_streams(door, port, count, num_tokens):
    """Begin streams at the same time; each with a future that is done when it has ended."""
    loop = asyncio.get_running_loop()
    request = request_bytes(door, port, num_tokens)

    async def begin():
        stream, over = Stream(time.perf_counter()), loop.create_future()
        transport, _ = await loop.create_connection(
            lambda: _Reader(stream, request, over), "127.0.0.1", port
        )
        return stream, over, transport

    return await asyncio.gather(*(begin() for _ in range(count)))


async def all_first_tokens(streams):
    """Wait until each stream has had text."""
    while not all(stream.first for stream, _, _ in streams):
        await asyncio.sleep(0.01)


async def load(door, port, count, num_tokens):
    """Run streams to their end; the figures of all of them."""
    started = time.perf_counter()
    streams = await open_streams(door, port, count, num_tokens)
    await asyncio.gather(*(over for _, over, _ in streams))
    ended = max(stream.last for stream, _, _ in streams)
    wanted = (PROMPT * (num_tokens // len(PROMPT) + 1))[:num_tokens]
    num_right = 0
    for stream, _, _ in streams:
        with contextlib.suppress(ValueError):
            num_right += stream.text == wanted
    firsts = sorted(s.first - s.begun for s, _, _ in streams if s.first is not None)
    gaps = sorted(gap for s, _, _ in streams for gap in s.gaps)
    return {
        "complete": num_right / count,
        "seconds": ended - started,
        "tokens_per_s": num_right * num_tokens / (ended - started),
        "first_p50_ms": 1000 * statistics.median(firsts) if firsts else None,
        "first_p99_ms": 1000 * _percentile(firsts, 0.99),
        "first_max_ms": 1000 * firsts[-1] if firsts else None,
        "gap_p50_ms": 1000 * _percentile(gaps, 0.5),
        "gap_p99_ms": 1000 * _percentile(gaps, 0.99),
    }


def _percentile(values, share):
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")
