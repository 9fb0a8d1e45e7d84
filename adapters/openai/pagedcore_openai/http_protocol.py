"""uvicorn's HTTP protocol, with limits and deadlines for bytes that are no request yet.

uvicorn itself waits for ever for the rest of a header, and keeps one of any size (EN-42).
"""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pagedcore.server_config import ServerConfig
from pagedcore_openai.errors import ApiError
from pagedcore_openai.intake import ABORT
from pagedcore_openai.watch import CONNECTION, Connection


class _RefusedError(Exception):
    """Something is above a limit; the parser hands it back as an error of its own."""


class GuardedHttp(HttpToolsProtocol):
    """Refuses headers above a limit with 431, and closes connections that never send them.

    Use a subclass that `guarded_http` made. It also offers the scope extensions "pagedcore.abort",
    which closes a connection whose reader does not read (STREAM-10), and "pagedcore.connection".
    """

    limits: ServerConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._connection = Connection()
        self._in_headers = True
        self._begun = False
        self._is_lost = False
        self._num_bytes = 0
        self._num_fields = 0
        self._num_chunks = 0
        self._exact_bytes = 0
        self._refusal: ApiError | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request's headers."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more, and let nobody work for it."""
        self._disarm()
        super().connection_lost(exc)
        self._connection.lose()

    def data_received(self, data: bytes) -> None:
        """Parse, unless the connection is to end; count what belongs to headers only."""
        if self.transport.is_closing() or self._is_lost:
            return
        if self._in_headers and self._begun:
            self._num_bytes += len(data)
        super().data_received(data)
        over = self._in_headers and self._num_bytes > self.limits.max_header_bytes
        if over and not self.transport.is_closing():
            self._refusal = self._too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Begin to count; a kept-alive connection's deadline starts here."""
        super().on_message_begin()
        self._begun = self._in_headers = True
        self._num_bytes = self._num_fields = self._num_chunks = self._exact_bytes = 0
        self._arm()
        scope = cast(dict[str, Any], self.scope)
        scope["extensions"] = {ABORT: self.transport.abort, CONNECTION: self._connection}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count one header field."""
        self._num_fields += 1
        self._exact_bytes += len(name) + len(value) + 4  # ": " and the end of the line
        limits = self.limits
        if (
            self._num_fields > limits.max_header_count
            or self._exact_bytes > limits.max_header_bytes
        ):
            self._refusal = self._too_large()
            raise _RefusedError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        self._in_headers = False
        self._disarm()
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Count one chunk of a body (IN-34)."""
        self._num_chunks += 1
        limit = self.limits.max_body_chunks
        if self._num_chunks > limit + 1:  # the last one is empty
            self._refusal = ApiError(400, f"the body may come in at most {limit} chunks")
            raise _RefusedError

    def on_message_complete(self) -> None:
        """Be ready for the next request's headers."""
        super().on_message_complete()
        self._in_headers = True
        self._begun = False

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, in the shape of every other error (ERR-1).

        Where an earlier request waits for its answer, it gets that, and then the connection ends.
        """
        cycle = self.cycle
        if (
            cycle is not None
            and not cycle.response_complete
            and (cycle.response_started or not cycle.more_body)
        ):
            self._is_lost = True
            cycle.keep_alive = False  # it ends the connection, after those before it
            return
        error = self._refusal or ApiError(400, "this is not a valid HTTP request")
        body = error.body()
        self.transport.write(
            STATUS_LINE[error.status]
            + b"content-type: application/json\r\n"
            + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            + body
        )
        self.transport.close()

    def _too_large(self) -> ApiError:
        limits = self.limits
        return ApiError(
            431,
            f"at most {limits.max_header_count} headers of {limits.max_header_bytes} bytes in all "
            "are allowed",
        )

    def _arm(self) -> None:
        if self._deadline is None:
            wait_s = self.limits.http_read_timeout
            self._deadline = self.loop.call_later(wait_s, self._expire)

    def _expire(self) -> None:
        """Close, unless what came while this process was held up completes the headers."""
        self._deadline = self.loop.call_later(0, self.transport.abort)  # after what can be read

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def guarded_http(server: ServerConfig) -> type[GuardedHttp]:
    """The protocol with this server's limits, as uvicorn's `http` setting takes it."""
    return type("GuardedHttp", (GuardedHttp,), {"limits": server})
