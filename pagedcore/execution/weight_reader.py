"""Read stored tensors into memory of a device, as fast as the files can be read.

Files are read by several threads, because one cannot copy from the page cache as fast as a disk
array or a GPU's bus moves data. For a GPU the pieces go through a ring of page-locked buffers, and
threads fill those ahead, in the order that is known, while earlier ones travel to the device.
"""

import os
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.safetensors_file import StoredTensor

PIECE_BYTES = 16 << 20
"""Most bytes that one thread reads at a time."""

MAX_THREADS = 8
NUM_BUFFERS = 2 * MAX_THREADS


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes [begin, end) of a tensor."""

    tensor: StoredTensor
    begin: int
    end: int


@dataclass(slots=True)
class _Buffer:
    """Memory that one thread fills at a time, and the last copy out of it."""

    memory: Tensor
    copied: torch.Event | None = None


class WeightReader:
    """Reads tensors one after the other; `order` is how they will be asked for, where known.

    On a GPU a tensor that `read` returns may still be on its way; work on the current stream waits.
    """

    def __init__(
        self,
        device: torch.device,
        order: Collection[StoredTensor],
        *,
        ahead: bool | None = None,
    ) -> None:
        """`ahead` reads through buffers, ahead of what is asked for; by default on GPUs."""
        self._device = device
        self._locked = device.type == "cuda"
        self._reads_ahead = self._locked if ahead is None else ahead
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "read-weights")
        self._order = list(order)
        self._place = {tensor: i for i, tensor in enumerate(self._order)}
        self._free: deque[_Buffer] = deque()
        self._planned: Iterator[_Piece] = iter(())
        self._filling: deque[tuple[_Piece, _Buffer, Future[None]]] = deque()

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor, in its stored type, on the device, contiguous and of its own.

        Raises ModelError when the file is shorter than its header was checked against.
        """
        target = torch.empty(tensor.num_bytes, dtype=torch.uint8, device=self._device)
        if self._reads_ahead:
            self._read_staged(tensor, target)
        else:
            jobs = [self._fill(piece, target[piece.begin : piece.end]) for piece in _split(tensor)]
            for job in jobs:
                job.result()
        return target.view(tensor.dtype).view(tensor.shape)

    def close(self) -> None:
        """End the threads and free the buffers."""
        self._pool.shutdown(cancel_futures=True)
        self._filling.clear()
        self._free.clear()

    def _fill(self, piece: _Piece, memory: Tensor) -> Future[None]:
        return self._pool.submit(_read_piece, piece, memory)

    def _read_staged(self, tensor: StoredTensor, target: Tensor) -> None:
        if not self._filling and not self._free:
            shape = (NUM_BUFFERS, PIECE_BYTES)
            buffers = torch.empty(shape, dtype=torch.uint8, pin_memory=self._locked)
            self._free.extend(_Buffer(memory) for memory in buffers)
        for wanted in _split(tensor):
            if not self._filling or self._filling[0][0] != wanted:
                self._plan(tensor)
            piece, buffer, job = self._filling.popleft()
            job.result()
            size = piece.end - piece.begin
            target[piece.begin : piece.end].copy_(buffer.memory[:size], non_blocking=True)
            if self._locked:
                buffer.copied = torch.cuda.current_stream(self._device).record_event()
            self._free.append(buffer)
            self._fill_free()

    def _plan(self, tensor: StoredTensor) -> None:
        """Read ahead from the begin of this tensor on, in the known order."""
        for _, buffer, job in self._filling:  # what was read ahead is not what is wanted
            job.result()
            self._free.append(buffer)
        self._filling.clear()
        place = self._place.get(tensor)
        following = [tensor] if place is None else self._order[place:]
        self._planned = (piece for each in following for piece in _split(each))
        self._fill_free()

    def _fill_free(self) -> None:
        while self._free:
            piece = next(self._planned, None)
            if piece is None:
                return
            buffer = self._free.popleft()
            if buffer.copied is not None:
                buffer.copied.synchronize()
            job = self._fill(piece, buffer.memory[: piece.end - piece.begin])
            self._filling.append((piece, buffer, job))


def parts_of(tensor: StoredTensor, dim: int, pieces: Sequence[range]) -> list[StoredTensor]:
    """What must be read for pieces of a dimension: them alone, if it is the first."""
    return [tensor] if dim else [tensor.rows(piece) for piece in pieces]


def join_parts(parts: Sequence[Tensor]) -> Tensor:
    """What was read below each other, as bytes: not every device joins every type."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


def _split(tensor: StoredTensor) -> Iterator[_Piece]:
    for begin in range(0, tensor.num_bytes, PIECE_BYTES):
        yield _Piece(tensor, begin, min(begin + PIECE_BYTES, tensor.num_bytes))


def _read_piece(piece: _Piece, memory: Tensor) -> None:
    """Fill memory [end - begin] uint8 from the file; runs in a thread of the pool."""
    view = memory.numpy().data
    at = 0
    with piece.tensor.path.open("rb", buffering=0) as file:
        file.seek(piece.tensor.offset + piece.begin)
        while at < len(view):
            count = file.readinto(view[at:])
            if not count:
                raise ModelError(f"{piece.tensor.path} became shorter while it was read.")
            at += count
