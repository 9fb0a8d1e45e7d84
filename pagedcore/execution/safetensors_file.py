"""Read the header of a safetensors file, trusting nothing in it.

The format: the header's length N in 8 bytes, N bytes of JSON, then the tensors' bytes. Lengths,
shapes and offsets come from the file, and so perhaps from an attacker: each is compared with the
bytes that are there before anything is allocated for it. The format asks that tensors lie end to
end, without holes, which also leaves no room for a tensor that is named twice.
"""

import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from pagedcore.errors import ModelError

MAX_HEADER_BYTES = 32 << 20
"""Twice what the largest models need in one file."""

MAX_DIMS = 8

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Torch's types by the format's names; the format's others are narrower than a byte."""

_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    num_bytes: int

    def rows(self, piece: range) -> "StoredTensor":
        """Some numbers of the first dimension, which lie together."""
        each = self.num_bytes // self.shape[0]
        return StoredTensor(
            self.path,
            self.dtype,
            (len(piece), *self.shape[1:]),
            self.offset + piece.start * each,
            len(piece) * each,
        )


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=MAX_DIMS)]
    data_offsets: tuple[_Size, _Size]


_decode_header = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_entry = msgspec.json.Decoder(_Entry).decode
_decode_metadata = msgspec.json.Decoder(dict[str, str]).decode


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, in the order of their offsets.

    Raises ModelError for a file that cannot be read, or whose header disagrees with the format, or
    with the size of the file.
    """
    header, size = _read_header_bytes(path)
    try:
        raw = _decode_header(header)
        _decode_metadata(raw.pop("__metadata__", msgspec.Raw(b"{}")))
        entries = {name: _decode_entry(entry) for name, entry in raw.items()}
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _broken(path, f"has a header that safetensors does not allow: {error}") from error
    if header.count(b'"data_offsets"') != len(entries):
        raise _broken(path, "names a tensor twice in its header")
    return _place(path, entries, start=8 + len(header), size=size)


def _read_header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON of the header, and the size of the file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is no file. Fetch the model again.")
        size = status.st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _broken(path, f"has {size} bytes, and a header that needs {length + 8}")
            if length > MAX_HEADER_BYTES:
                raise _broken(path, f"has a header of {length} bytes; {MAX_HEADER_BYTES} are read")
            return file.read(length), size
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror or error}. Fetch the model again."
        ) from error


def _place(
    path: Path, entries: dict[str, _Entry], *, start: int, size: int
) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in DTYPES:
            raise _broken(
                path,
                f"has {name!r} in the type {entry.dtype!r:.40}; those read are {', '.join(DTYPES)}",
            )
        dtype = DTYPES[entry.dtype]
        begin, end = entry.data_offsets
        needed = math.prod(entry.shape) * dtype.itemsize
        if end - begin != needed:
            raise _broken(
                path,
                f"gives {name!r} {end - begin} bytes, and {entry.dtype} {entry.shape} is {needed}",
            )
        if begin != at:
            problem = "overlap with the tensor before it" if begin < at else "follow a hole"
            raise _broken(path, f"lets {name!r} {problem}: it begins at {begin}, not at {at}")
        at = end
        if start + end > size:
            raise _broken(
                path, f"is cut off: it has {size} bytes, and {name!r} ends at {start + end}"
            )
        tensors[name] = StoredTensor(path, dtype, tuple(entry.shape), start + begin, needed)
    if start + at != size:
        raise _broken(path, f"has {size} bytes, and its tensors end at {start + at}")
    return tensors


def _broken(path: Path, offence: str) -> ModelError:
    return ModelError(f"{path} {offence}. Fetch the model again, or take another.")
