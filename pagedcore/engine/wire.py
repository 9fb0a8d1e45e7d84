"""The messages between front ends and an engine: msgpack over a unix socket, checked by type.

A frame is the length of a message (4 bytes, little-endian) and the message. A connection is one
front end's life: when it ends, whatever it had asked for is aborted, so nothing is said at the
beginning but the server's `Welcome`, and nothing at the end.

Ids are chosen by the front end, count up, and mean something in one connection only. A request of
n choices takes n of them: `id` to `id + n - 1`. Arrays travel as raw little-endian bytes.
"""

import struct
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from pagedcore.engine.info import EngineInfo
from pagedcore.errors import EngineDeadError, MissingError, OverloadedError, RequestError
from pagedcore.pooling import PoolingParams
from pagedcore.request import SamplingParams
from pagedcore.step import Finished, Int64, StepOutput, TokenLogprobs

VERSION = 5
"""Raised with every change of a message; the two ends must agree."""

MAX_REQUEST_BYTES = 64 << 20
"""Largest frame that a server takes: sixteen million prompt tokens."""

MAX_MESSAGE_CHARS = 2048
"""Longest error text that is passed on (semantics ERR-3)."""

_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 2**32 - 1

MAX_CHOICES = 16384
"""Most choices of one request, whatever a front end allows."""

# Inside the engine, ids of different front ends must differ: the upper bits are the connection.
_ID_BITS = 40
MAX_CONNECTION = (1 << 63 - _ID_BITS) - 1
"""Largest number of a connection, so that ids stay int64."""

ClientId = Annotated[int, Meta(ge=0, lt=2**_ID_BITS - MAX_CHOICES)]
TokenId = Annotated[int, Meta(ge=-1, lt=2**31)]
Priority = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
Int32Bytes = bytes
Int64Bytes = bytes
Float32Bytes = bytes


class Add(Struct, tag="add", array_like=True, frozen=True):
    """Queue a request and, for n > 1, its forks. Answered by `Admitted` or `Refused`."""

    id: ClientId
    prompt_token_ids: Int32Bytes
    params: SamplingParams
    eos_token_id: TokenId
    bad_words_token_ids: tuple[tuple[TokenId, ...], ...] = ()
    priority: Priority = 0
    cache_salt: str | None = None
    pooling: PoolingParams | None = None
    """With it, the answer is a vector and no tokens."""
    owner: Annotated[str, Meta(max_length=64)] = ""
    adapter: Annotated[str, Meta(max_length=255)] | None = None
    """Name of the adapter (LoRA) that it runs with."""


class Abort(Struct, tag="abort", array_like=True, frozen=True):
    """End sequences in whatever state they are; unknown ids are ignored (CANCEL-2)."""

    ids: list[ClientId]


class Call(Struct, tag="call", array_like=True, frozen=True):
    """Ask for something by name. Answered by `Reply` with the same id."""

    id: int
    name: str
    arguments: dict[str, Any]


FromClient = Add | Abort | Call


class Failure(Struct, array_like=True, frozen=True):
    """An exception on its way to another process: see `failure_of` and `exception_of`."""

    kind: Literal["request", "missing", "overloaded", "dead", "internal"]
    message: str
    param: str | None = None
    reason: str = ""
    retry_after_s: int = 1


class PackedLogprobs(Struct, array_like=True, frozen=True):
    """`TokenLogprobs` as bytes."""

    token_ids: Int32Bytes
    logprobs: Float32Bytes
    ranks: Int32Bytes


class Welcome(Struct, tag="welcome", array_like=True, frozen=True):
    """The first message of a connection. `epoch` differs from one life of an engine to the next."""

    version: int
    epoch: str
    pid: int
    info: EngineInfo


class Admitted(Struct, tag="admitted", array_like=True, frozen=True):
    """The request with this id waits or runs."""

    id: int


class Refused(Struct, tag="refused", array_like=True, frozen=True):
    """The request with this id was not taken, nor was any of its choices."""

    id: int
    failure: Failure


class Outputs(Struct, tag="outputs", array_like=True, frozen=True):
    """Everything that one step has for one front end: a `StepOutput` in the front end's ids."""

    ids: Int64Bytes
    tokens: Int32Bytes
    finished: list[Finished] = []
    logprobs: dict[int, PackedLogprobs] = {}
    prompt_logprobs: dict[int, list[PackedLogprobs]] = {}
    num_cached_tokens: dict[int, int] = {}
    queue_seconds: dict[int, float] = {}
    vectors: dict[int, Float32Bytes] = {}


class Reply(Struct, tag="reply", array_like=True, frozen=True):
    """The answer to a call: a value, or why there is none."""

    id: int
    value: Any = None
    failure: Failure | None = None


class Malformed(Struct, tag="malformed", array_like=True, frozen=True):
    """A message could not be understood; the connection goes on."""

    message: str


class Dead(Struct, tag="dead", array_like=True, frozen=True):
    """The engine has failed and its process is about to end."""

    message: str


FromServer = Welcome | Admitted | Refused | Outputs | Reply | Malformed | Dead

_encoder = msgspec.msgpack.Encoder()
_from_client: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_from_server: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)


def encode(message: FromClient | FromServer) -> bytes:
    """The frame of a message."""
    frame = bytearray(4)
    _encoder.encode_into(message, frame, 4)
    _LENGTH.pack_into(frame, 0, len(frame) - 4)
    return bytes(frame)


def decode_from_client(frame: bytes) -> FromClient:
    """Raise msgspec.ValidationError or DecodeError for anything but a proper message."""
    return _from_client.decode(frame)


def decode_from_server(frame: bytes) -> FromServer:
    """Raise msgspec.ValidationError or DecodeError for anything but a proper message."""
    return _from_server.decode(frame)


class FrameReader:
    """Cuts a stream of bytes into messages, however it arrives."""

    def __init__(self, max_bytes: int = _MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that are complete with `data`.

        Raises ValueError for a frame that is too long: the stream cannot be followed any more.
        """
        buffer = self._buffer
        buffer += data
        frames = []
        start = 0
        while len(buffer) >= start + 4:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > self._max_bytes:
                raise ValueError(f"a frame of {length} bytes; {self._max_bytes} are allowed")
            end = start + 4 + length
            if len(buffer) < end:
                break
            frames.append(bytes(buffer[start + 4 : end]))
            start = end
        del buffer[:start]
        return frames


def engine_id(connection: int, client_id: int) -> int:
    """The engine's id for a front end's id."""
    return connection << _ID_BITS | client_id


def owner_of(request_id: int) -> int:
    """The connection that an engine's id belongs to."""
    return request_id >> _ID_BITS


def split_by_connection(output: StepOutput) -> dict[int, Outputs]:
    """Give each connection its part of a step, in its own ids."""
    ids = output.request_ids & ((1 << _ID_BITS) - 1)
    parts = {}
    for connection, indices in _group(output.request_ids >> _ID_BITS):
        parts[connection] = Outputs(
            ids[indices].tobytes(), output.tokens[indices].tobytes(), [], {}, {}, {}, {}, {}
        )

    def part_of(request_id: int) -> tuple[Outputs, int]:
        connection, client_id = divmod(request_id, 1 << _ID_BITS)
        if connection not in parts:
            parts[connection] = Outputs(b"", b"", [], {}, {}, {}, {}, {})
        return parts[connection], client_id

    for end in output.finished:
        part, client_id = part_of(end.request_id)
        part.finished.append(Finished(client_id, end.reason, end.stop_reason, end.message))
    for request_id, entry in output.logprobs.items():
        part, client_id = part_of(request_id)
        part.logprobs[client_id] = pack_logprobs(entry)
    for request_id, entries in output.prompt_logprobs.items():
        part, client_id = part_of(request_id)
        part.prompt_logprobs[client_id] = [pack_logprobs(entry) for entry in entries]
    for request_id, count in output.num_cached_tokens.items():
        part, client_id = part_of(request_id)
        part.num_cached_tokens[client_id] = count
    for request_id, seconds in output.queue_seconds.items():
        part, client_id = part_of(request_id)
        part.queue_seconds[client_id] = seconds
    for request_id, vector in output.vectors.items():
        part, client_id = part_of(request_id)
        part.vectors[client_id] = np.ascontiguousarray(vector, np.float32).tobytes()
    return parts


def _group(owners: Int64) -> list[tuple[int, Int64 | slice]]:
    """Indices by owner, each owner's in order."""
    if len(owners) == 0:
        return []
    first = int(owners[0])
    if (owners == first).all():
        return [(first, slice(None))]
    order = np.argsort(owners, kind="stable")
    bounds = np.flatnonzero(np.diff(owners[order])) + 1
    return [(int(owners[indices[0]]), indices) for indices in np.split(order, bounds)]


def pack_logprobs(entry: TokenLogprobs) -> PackedLogprobs:
    """As bytes."""
    return PackedLogprobs(
        np.ascontiguousarray(entry.token_ids, np.int32).tobytes(),
        np.ascontiguousarray(entry.logprobs, np.float32).tobytes(),
        np.ascontiguousarray(entry.ranks, np.int32).tobytes(),
    )


def unpack_logprobs(entry: PackedLogprobs) -> TokenLogprobs:
    """As read-only arrays."""
    return TokenLogprobs(
        np.frombuffer(entry.token_ids, np.int32),
        np.frombuffer(entry.logprobs, np.float32),
        np.frombuffer(entry.ranks, np.int32),
    )


def failure_of(error: BaseException) -> Failure:
    """What another process may know of an exception: of an unexpected one, only its type."""
    message = str(error)[:MAX_MESSAGE_CHARS]
    match error:
        case MissingError():
            return Failure("missing", message, param=error.param)
        case RequestError():
            return Failure("request", message, param=error.param)
        case OverloadedError():
            return Failure(
                "overloaded", message, reason=error.reason, retry_after_s=error.retry_after_s
            )
        case EngineDeadError():
            return Failure("dead", message)
        case _:
            return Failure("internal", f"the engine failed with {type(error).__name__}")


def exception_of(failure: Failure) -> Exception:
    """The exception that `failure_of` described; an unexpected one is a RuntimeError."""
    match failure.kind:
        case "request":
            return RequestError(failure.message, failure.param)
        case "missing":
            return MissingError(failure.message, failure.param)
        case "overloaded":
            return OverloadedError(failure.message, failure.reason, failure.retry_after_s)
        case "dead":
            return EngineDeadError(failure.message)
        case _:
            return RuntimeError(failure.message)
