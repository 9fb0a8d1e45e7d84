"""A small HTTP/1.1 client that streams OpenAI answers and notes when each piece came.

It opens a connection per request and speaks no more of HTTP than servers of models do: bodies with
a length, in chunks (RFC 9112, section 7.1), or until the connection closes.
"""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_LINE_LIMIT = 2**24
"""Most bytes of one line; log-probabilities of a whole vocabulary are long."""


class ServerError(Exception):
    """The server answered with an error, or not as HTTP and OpenAI's interface say."""


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it. Times are seconds."""

    started: float
    """When it was sent, on `time.perf_counter`."""

    error: str | None = None
    """Why there is no answer; the other fields are then without meaning."""

    num_input: int = 0
    """Prompt tokens, as the server counted them."""

    num_output: int = 0
    """Answer tokens, as the server counted them, or else pieces of text."""

    time_to_first: float = 0.0
    """From sending to the first piece of text (TTFT)."""

    intervals: list[float] = field(default_factory=list)
    """Between pieces of text (ITL)."""

    latency: float = 0.0
    """From sending to the last piece of text (E2EL)."""

    texts: list[str] = field(default_factory=list)
    """The pieces of text."""

    @property
    def time_per_token(self) -> float | None:
        """Seconds per token after the first (TPOT); None for answers of one token."""
        if self.num_output < 2:
            return None
        return (self.latency - self.time_to_first) / (self.num_output - 1)


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask, and what to show there."""

    base_url: str
    """Such as http://127.0.0.1:8000, without a path of its own or with one that paths follow."""

    api_key: str | None = None

    async def model(self) -> str:
        """The first model that the server has."""
        async with asyncio.timeout(30), self._request("GET", "/v1/models", None) as pieces:
            text = b"".join([piece async for piece in pieces])
        try:
            name: str = json.loads(text)["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(f"/v1/models does not list a model: {error!r}") from None
        return name

    async def stream(self, path: str, body: Mapping[str, Any]) -> Outcome:
        """Send a request with `stream` and measure its answer. Failures are in the outcome."""
        outcome = Outcome(time.perf_counter())
        last = outcome.started
        try:
            async with self._request("POST", path, body) as pieces:
                async for event in _events(pieces):
                    last = _note(outcome, event, last)
        except (OSError, ServerError, ValueError, asyncio.IncompleteReadError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
            return outcome
        if last == outcome.started:
            outcome.error = "the answer holds no text"
        outcome.num_output = outcome.num_output or len(outcome.intervals) + 1
        outcome.latency = last - outcome.started
        return outcome

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The body of the answer, in pieces; raises ServerError for a status that is not 200."""
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or url.hostname is None:
            raise ServerError(
                f"{self.base_url!r} is not a URL that begins with http:// or https://"
            )
        secure = ssl.create_default_context() if url.scheme == "https" else None
        port = url.port or (443 if secure else 80)
        reader, writer = await asyncio.open_connection(
            url.hostname, port, ssl=secure, limit=_LINE_LIMIT
        )
        try:
            payload = b"" if body is None else json.dumps(body).encode()
            head = [
                f"{method} {url.path.rstrip('/')}{path} HTTP/1.1",
                f"Host: {url.netloc}",
                "Connection: close",
                "Accept: text/event-stream, application/json",
                "Content-Type: application/json",
                f"Content-Length: {len(payload)}",
            ]
            if self.api_key:
                head.append(f"Authorization: Bearer {self.api_key}")
            writer.write("\r\n".join([*head, "", ""]).encode() + payload)
            await writer.drain()
            status, headers = await _head(reader)
            if status != 200:
                text = b"".join([piece async for piece in _body(reader, headers)])
                raise ServerError(f"HTTP {status}: {text[:300].decode(errors='replace')}")
            yield _body(reader, headers)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


def _note(outcome: Outcome, event: Mapping[str, Any], last: float) -> float:
    """Take one event over; returns when the last piece of text came."""
    if "error" in event:
        raise ServerError(str(event["error"]))
    usage = event.get("usage") or {}
    outcome.num_input = usage.get("prompt_tokens", outcome.num_input)
    outcome.num_output = usage.get("completion_tokens", outcome.num_output)
    text = "".join(_text(choice) for choice in event.get("choices", ()))
    if not text:
        return last
    outcome.texts.append(text)
    now = time.perf_counter()
    if last == outcome.started:
        outcome.time_to_first = now - outcome.started
    else:
        outcome.intervals.append(now - last)
    return now


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status, and headers with lower-case names."""
    parts = (await reader.readline()).split(maxsplit=2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
        raise ServerError("the answer is not HTTP/1")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return int(parts[1]), headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(2**16):
            yield piece


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """JSON of server-sent events up to [DONE]; raises ServerError for a stream that ends before."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise ServerError("the stream ended without [DONE]")


def _text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta") or {}
    text = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
    return text or delta.get("reasoning") or ""
