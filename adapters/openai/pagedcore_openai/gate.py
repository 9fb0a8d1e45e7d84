"""Keys, limits and deadlines, before a request is looked at (semantics 5.5).

The gate stands in front of every route, also those of a framework that the surface is mounted in.
"""

import asyncio
import contextlib
import hashlib
import hmac
import math
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedcore.server_config import ServerConfig
from pagedcore_openai.errors import ApiError

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CLOSE = {"connection": "close"}
REQUEST_ID = "pagedcore_request_id"
"""Where a scope's state holds the id of STREAM-1."""

DEADLINE = "pagedcore_deadline"
"""Where it holds when the answer must be complete, in the event loop's time, or None."""

KEY = "pagedcore_key"
"""Where it holds the digest of the caller's key; empty where no key is known."""

ARRIVAL = "pagedcore_arrival"
"""Where it holds when the request came, in the same time."""

TRACE = "pagedcore_trace"
"""Where it holds the `RequestTrace`, if there is one."""

LINGER_S = 2.0
"""Seconds for which the rest of a refused body is read: closing a connection with something
unread would make the client's system throw our answer away."""


def owner_of(digest: bytes) -> str:
    """What an engine is told of a key's digest: enough to tell keys apart, and no more."""
    return digest[:8].hex()


def valid_request_id(value: str | None) -> str | None:
    """`value`, if it can be a request's id."""
    return value if value is not None and _ID.fullmatch(value) else None


class Gate:
    """ASGI middleware: an application behind it sees requests that are authorised and complete."""

    def __init__(self, app: ASGIApp, server: ServerConfig) -> None:
        self._app = app
        self._server = server
        self._digests = [_digest(key.encode()) for key in server.api_key]
        self._exempt = frozenset(server.auth_exempt_paths)
        self._in_flight: Counter[bytes] = Counter()
        per_minute = server.max_requests_per_minute
        self._rate = _Rate(per_minute) if per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is in order; answer anything else."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._request(scope, receive, send)
        elif self._digests:  # a websocket of the framework around us: keys are for HTTP
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _Headers(scope)
        reader = _Reader(receive)
        state = scope.setdefault("state", {})
        state[REQUEST_ID] = valid_request_id(headers.get(b"x-request-id")) or os.urandom(16).hex()
        state[ARRIVAL] = asyncio.get_running_loop().time()
        state[DEADLINE] = None

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = (b"x-request-id", state[REQUEST_ID].encode())
                message = {**message, "headers": [*message.get("headers", ()), own]}
            await send(message)

        try:
            self._check_headers(scope)
            key = state[KEY] = self._authorised(scope["path"], headers)
            with self._counted(scope["method"], key):
                state[DEADLINE] = _deadline(headers)
                if scope["method"] in ("POST", "PUT", "PATCH"):
                    body = await self._body(headers, reader)
                    await self._app(scope, _replay(body, reader), send_with_id)
                else:
                    await self._app(scope, reader, send_with_id)
        except ApiError as error:
            closes = error.headers.get("connection") == "close"
            answer = _lingering(send_with_id, reader) if closes else send_with_id
            await error.response()(scope, reader, answer)

    def _check_headers(self, scope: Scope) -> None:
        fields = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in fields)
        server = self._server
        if len(fields) > server.max_header_count or size > server.max_header_bytes:
            raise ApiError(
                431,
                f"at most {server.max_header_count} headers of {server.max_header_bytes} bytes "
                "in all are allowed",
                headers=_CLOSE,
            )

    def _authorised(self, path: str, headers: "_Headers") -> bytes:
        """The digest of the caller's key, empty without a known one; raises ApiError 401."""
        key = _presented_key(headers)
        digest = b"" if key is None else _digest(key.encode("latin-1"))
        # All are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if True in matches:
            return digest
        if self._digests and path not in self._exempt:
            message = (
                "a valid API key is needed: send the header Authorization: Bearer <key>, "
                "or X-API-Key: <key>"
            )
            close = {"www-authenticate": "Bearer", **_CLOSE}
            raise ApiError(401, message, headers=close)
        return b""

    @contextmanager
    def _counted(self, method: str, key: bytes) -> Iterator[None]:
        """Count a request of a key; callers without one share a count (QUEUE-4)."""
        if method != "POST":
            yield
            return
        if self._rate is not None:
            self._rate.take(key)
        limit = self._server.max_inflight_per_key
        if limit and self._in_flight[key] >= limit:
            raise ApiError(
                429,
                f"{limit} requests of this key are in flight already",
                headers={"retry-after": "1"},
            )
        self._in_flight[key] += 1
        try:
            yield
        finally:
            self._in_flight[key] -= 1
            if not self._in_flight[key]:
                del self._in_flight[key]

    async def _body(self, headers: "_Headers", receive: "_Reader") -> bytes:
        """The whole body; raises ApiError 400, 408, 413 or 415."""
        limit = self._server.max_request_bytes
        length = headers.get(b"content-length")
        if length is not None:
            if headers.get(b"transfer-encoding") is not None:
                message = "a request may not have both content-length and transfer-encoding"
                raise ApiError(400, message, headers=_CLOSE)
            if not re.fullmatch("[0-9]{1,18}", length):
                raise ApiError(400, "content-length must be a number", headers=_CLOSE)
            if int(length) > limit:
                raise _too_large(limit)
        if (headers.get(b"content-encoding") or "identity") != "identity":
            raise ApiError(415, "compressed bodies are not accepted", headers=_CLOSE)
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._server.http_read_timeout):
                more = True
                while more:
                    message_in = await receive()
                    if message_in["type"] != "http.request":
                        raise ApiError(400, "the client went away before its body was complete")
                    pieces.append(message_in.get("body", b""))
                    size += len(pieces[-1])
                    if size > limit:
                        raise _too_large(limit)
                    more = message_in.get("more_body", False)
        except TimeoutError:
            limit_s = self._server.http_read_timeout
            message = f"the body was not complete within {limit_s:g} s"
            raise ApiError(408, message, headers=_CLOSE) from None
        return b"".join(pieces)


class _Rate:
    """Refuses what one key asks for above so many requests in any minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._taken: dict[bytes, deque[float]] = {}

    def take(self, key: bytes) -> None:
        """Count a request; raises ApiError 429."""
        now = asyncio.get_running_loop().time()
        taken = self._taken.setdefault(key, deque())
        while taken and now - taken[0] >= 60:
            taken.popleft()
        if len(taken) >= self._per_minute:
            wait = max(1, math.ceil(60 - (now - taken[0])))
            raise ApiError(
                429,
                f"this key may ask {self._per_minute} times in a minute",
                headers={"retry-after": str(wait)},
            )
        taken.append(now)


class _Reader:
    """A `receive` that knows whether the request's body is over."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_at_end = False

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.is_at_end = True
        return message


class _Headers:
    """A scope's headers by lower-case name; the first counts."""

    def __init__(self, scope: Scope) -> None:
        self._fields: dict[bytes, bytes] = dict(reversed(scope["headers"]))

    def get(self, name: bytes) -> str | None:
        value = self._fields.get(name)
        return None if value is None else value.decode("latin-1")


def _presented_key(headers: _Headers) -> str | None:
    """The key of an Authorization header, or else of X-API-Key."""
    authorization = headers.get(b"authorization")
    if authorization is None:
        return headers.get(b"x-api-key")
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _deadline(headers: _Headers) -> float | None:
    """When `x-request-timeout` seconds from now are over; raises ApiError 400.

    A request that is not answered by then is 408, or a stream's error event, and leaves the engine.
    """
    text = headers.get(b"x-request-timeout")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not float(text):
        message = "the header x-request-timeout must be a number of seconds above 0"
        raise ApiError(400, message, "x-request-timeout")
    return asyncio.get_running_loop().time() + float(text)


def _lingering(send: Send, receive: _Reader) -> Send:
    """A `send` that reads what is left of the request before it lets the connection close."""

    async def lingering(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        await send({**message, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not receive.is_at_end:
                    await receive()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return lingering


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body may have at most {limit} bytes", headers=_CLOSE)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, and then what `receive` gives."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
