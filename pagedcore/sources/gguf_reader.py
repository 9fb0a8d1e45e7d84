"""Read GGUF files, trusting nothing in them.

The format is specified in ggml's docs/gguf.md. Counts, lengths and offsets come from the file, and
so perhaps from an attacker: each is compared with the bytes that are there before anything is
allocated or read for it.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pagedcore.errors import ModelError
from pagedcore.sources.gguf_quants import BLOCK_TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_ENTRIES = 1 << 16
"""Most tensors, and most entries of metadata: many times what the largest models have."""
MAX_ITEMS = 1 << 20
"""Most items in an array of metadata: several times what the largest vocabularies need."""
MAX_NAME_BYTES = 256
"""Longest name of a tensor or of an entry; ggml's own limit for tensors is 64."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Numpy types of the metadata value types that have a fixed size."""

_SMALLEST_PAIR = 8 + 4 + 1  # an empty key, its type, one byte
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, type, offset


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies in the file. `shape` is outermost first, as in numpy."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    """Bytes from the start of the file."""

    @property
    def num_rows(self) -> int:
        """How many rows of `shape[-1]` values there are."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] // self.type.block_size * self.type.block_bytes


class GgufFile:
    """The metadata of a GGUF file, and its tensors as views of the mapped file."""

    def __init__(
        self,
        path: Path,
        data: mmap.mmap,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, GgufTensor],
    ) -> None:
        self.path = path
        self.metadata = metadata
        """Numbers, booleans and strings; arrays of strings are lists, others numpy arrays."""
        self.tensors = tensors
        self._data = data

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a file and read its header.

        Raises ModelError for a file that cannot be read, is no little-endian GGUF of version 2 or
        3, or whose header disagrees with itself or with the size of the file.
        """
        try:
            with path.open("rb") as file:
                magic = file.read(len(MAGIC))
                if magic != MAGIC:
                    raise ModelError(
                        f"{path} is no GGUF file: it begins with {magic!r}, not {MAGIC!r}."
                    )
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
        metadata, tensors = _Header(path, data).read()
        return cls(path, data, metadata, tensors)

    def rows(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor, [num_rows, row_bytes], read when they are touched."""
        count = tensor.num_rows * tensor.row_bytes
        flat = np.frombuffer(self._data, np.uint8, count, tensor.offset)
        return flat.reshape(tensor.num_rows, tensor.row_bytes)


class _Header:
    """A cursor over the header that never passes the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = len(MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self._number("I", "the version")
        if version not in VERSIONS:
            if version.to_bytes(4, "little")[3] in VERSIONS:
                raise self._broken("is big-endian, and only little-endian GGUF is read")
            raise self._broken(f"has GGUF version {version}, and only 2 and 3 are read")
        num_tensors = self._number("Q", "the number of tensors")
        num_pairs = self._number("Q", "the number of metadata entries")
        for count, what in ((num_tensors, "tensors"), (num_pairs, "metadata entries")):
            if count > MAX_ENTRIES:
                raise self._broken(f"has {count} {what}, and {MAX_ENTRIES} are allowed")
        self._need(num_pairs * _SMALLEST_PAIR, f"{num_pairs} metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string("a metadata key", MAX_NAME_BYTES)
            if key in metadata:
                raise self._broken(f"has the metadata key {key!r} twice")
            metadata[key] = self._value(key)
        self._need(num_tensors * _SMALLEST_TENSOR, f"{num_tensors} tensors")
        return metadata, self._tensors(num_tensors, self._alignment(metadata))

    def _value(self, key: str) -> Any:
        kind = self._number("I", f"the type of {key!r}")
        if kind == _STRING:
            return self._string(f"the value of {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        value = self._numbers(key, kind, 1)[0]
        return bool(value) if kind == _BOOL else value.item()

    def _array(self, key: str) -> list[str] | npt.NDArray[Any]:
        kind = self._number("I", f"the type of the items of {key!r}")
        count = self._number("Q", f"the length of {key!r}")
        if count > MAX_ITEMS:
            raise self._broken(f"has {count} items in {key!r}, and {MAX_ITEMS} are allowed")
        if kind == _ARRAY:
            raise self._broken(f"has arrays within the array {key!r}, which no model uses")
        if kind != _STRING:
            return self._numbers(key, kind, count)
        self._need(count * 8, f"the {count} items of {key!r}")
        what = f"an item of {key!r}"
        return [self._string(what) for _ in range(count)]

    def _numbers(self, key: str, kind: int, count: int) -> npt.NDArray[Any]:
        if kind not in _NUMBERS:
            raise self._broken(f"has a value of the unknown type {kind} at {key!r}")
        dtype = np.dtype(_NUMBERS[kind])
        at = self._take(count * dtype.itemsize, f"the value of {key!r}")
        return np.frombuffer(self._data, dtype, count, at).copy()

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or value < 8 or value & (value - 1):
            raise self._broken("has a general.alignment that is no power of two from 8 on")
        return value

    def _tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        found = []
        for _ in range(count):
            found.append(self._tensor(alignment))
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end = data_start
        for name, shape, block_type, offset in sorted(found, key=lambda item: item[3]):
            tensor = GgufTensor(name, shape, block_type, data_start + offset)
            if name in tensors:
                raise self._broken(f"has the tensor {name!r} twice")
            if tensor.offset < end:
                raise self._broken(f"lets the tensor {name!r} overlap with another")
            # Python's integers: no shape is so large that this comes out small.
            num_bytes = tensor.row_bytes
            for size in shape[:-1]:
                num_bytes *= size
            end = tensor.offset + num_bytes
            if end > self._size:
                raise self._broken(
                    f"ends at byte {self._size}, but the tensor {name!r} at {end}: it is cut off"
                )
            tensors[name] = tensor
        return tensors

    def _tensor(self, alignment: int) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self._string("the name of a tensor", MAX_NAME_BYTES)
        num_dims = self._number("I", f"the rank of {name!r}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._broken(f"has {num_dims} dimensions for {name!r}, not 1 to {MAX_DIMS}")
        sizes = [self._number("Q", f"the shape of {name!r}") for _ in range(num_dims)]
        shape = tuple(reversed(sizes))  # the file has the innermost first
        if 0 in shape:
            raise self._broken(f"has the empty shape {shape} for {name!r}")
        kind = self._number("I", f"the type of {name!r}")
        if kind not in BLOCK_TYPES:
            allowed = ", ".join(t.name for t in BLOCK_TYPES.values())
            raise ModelError(
                f"{self._path}: {name!r} has ggml's tensor type {kind}; those read are {allowed}. "
                "Take a file in one of these, such as Q8_0 or Q4_K_M."
            )
        block_type = BLOCK_TYPES[kind]
        if shape[-1] % block_type.block_size:
            raise self._broken(
                f"has rows of {shape[-1]} values in {name!r}, not whole blocks of "
                f"{block_type.block_size} as {block_type.name} needs"
            )
        offset = self._number("Q", f"the offset of {name!r}")
        if offset % alignment:
            raise self._broken(f"has {name!r} at offset {offset}, no multiple of {alignment}")
        return name, shape, block_type, offset

    def _string(self, what: str, most: int | None = None) -> str:
        length = self._number("Q", what)
        if most is not None and length > most:
            raise self._broken(f"has {what} of {length} bytes, and {most} are allowed")
        at = self._take(length, what)
        try:
            return self._data[at : at + length].decode()
        except UnicodeDecodeError:
            raise self._broken(f"has {what} that is not UTF-8") from None

    def _number(self, code: str, what: str) -> int:
        at = self._take(struct.calcsize(f"<{code}"), what)
        value: int = struct.unpack_from(f"<{code}", self._data, at)[0]
        return value

    def _take(self, count: int, what: str) -> int:
        self._need(count, what)
        at = self._at
        self._at += count
        return at

    def _need(self, count: int, what: str) -> None:
        left = self._size - self._at
        if count > left:
            raise self._broken(f"has {left} bytes left where {what} needs {count}")

    def _broken(self, offence: str) -> ModelError:
        return ModelError(f"{self._path} {offence}. Fetch the file again, or take another.")
