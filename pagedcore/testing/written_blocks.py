"""Writes matrices in the block types of GGUF files, by rounding to the nearest.

    n blocks of one matrix   v values of a block   r runs in it, which have a scale each

The layouts are told in `pagedcore.sources.gguf_quants`, of which nothing is used here, so that one
can be tested against the other. Whoever makes such files for others looks for better scales than
these, which follow from the largest numbers alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_LEAST = np.float32(1e-7)  # of a scale, which float16 can hold


@dataclass(frozen=True, slots=True)
class WrittenBlocks:
    """One type of block."""

    number: int
    """What ggml calls it."""

    size: int
    """Values of a block."""

    pack: Callable[[Floats], Bytes]
    """From values [n, v] to blocks [n, bytes]."""

    error: float
    """No number is off by more than this share of the largest of the matrix."""

    def write(self, weight: Floats) -> Bytes:
        """A matrix [out, in], whose rows are whole blocks, as rows of blocks [out, bytes]."""
        return self.pack(weight.astype(np.float32).reshape(-1, self.size)).reshape(len(weight), -1)


def _half(scale: Floats) -> tuple[Floats, Bytes]:
    """Scales [n, 1] as float16 holds them, and their bytes [n, 2]."""
    rounded = scale.astype("<f2")
    return rounded.astype(np.float32), rounded.view(np.uint8)


def _codes(values: Floats, scale: Floats, most: int, offset: Floats | int) -> Bytes:
    """Values in steps of `scale`, plus an offset, as codes from 0 to `most`."""
    steps = values / np.where(scale == 0, 1, scale)
    return np.clip(np.rint(steps + offset), 0, most).astype(np.uint8)


def _signed_largest(values: Floats) -> Floats:
    """Of the last axis, which stays, the number that is largest without its sign."""
    at = np.abs(values).argmax(-1, keepdims=True)
    return np.take_along_axis(values, at, -1)


def _nibbles(codes: Bytes) -> Bytes:
    """Codes [..., 2 * w] of 4 bits as bytes [..., w]: the first half in the low bits."""
    first, second = np.split(codes & 15, 2, -1)
    return first | second << 4


def _fifth_bits(codes: Bytes) -> Bytes:
    """The highest bits of codes [n, 32] of 5 bits: [n, 4]."""
    return np.packbits(codes >> 4, axis=-1, bitorder="little")


def _q8_0(values: Floats) -> Bytes:
    d, stored = _half(np.abs(values).max(1, keepdims=True) / 127 + _LEAST)
    signed = np.clip(np.rint(values / d), -128, 127).astype(np.int8)
    return np.concatenate([stored, signed.view(np.uint8)], 1)


def _q4_0(values: Floats) -> Bytes:
    d, stored = _half(_signed_largest(values) / -8)
    return np.concatenate([stored, _nibbles(_codes(values, d, 15, 8))], 1)


def _q5_0(values: Floats) -> Bytes:
    d, stored = _half(_signed_largest(values) / -16)
    codes = _codes(values, d, 31, 16)
    return np.concatenate([stored, _fifth_bits(codes), _nibbles(codes)], 1)


def _with_minimum(values: Floats, most: int) -> tuple[Bytes, Bytes]:
    """Scale and minimum [n, 4], and codes, of runs [n, 32] whose least value has code 0."""
    low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
    m, stored_m = _half(low)
    d, stored_d = _half((high - low) / most + _LEAST)
    return np.concatenate([stored_d, stored_m], 1), _codes(values - m, d, most, 0)


def _q4_1(values: Floats) -> Bytes:
    head, codes = _with_minimum(values, 15)
    return np.concatenate([head, _nibbles(codes)], 1)


def _q5_1(values: Floats) -> Bytes:
    head, codes = _with_minimum(values, 31)
    return np.concatenate([head, _fifth_bits(codes), _nibbles(codes)], 1)


def _runs_k(values: Floats, most: int) -> tuple[Bytes, Bytes]:
    """The 16 bytes of scales of Q4_K and Q5_K, and codes [n, 8, 32], of values [n, 256]."""
    runs = values.reshape(-1, 8, 32)
    low = np.minimum(runs.min(2), 0)
    step = (runs.max(2) - low) / most
    d, stored_d = _half(step.max(1, keepdims=True) / 63 + _LEAST)
    m, stored_m = _half(-low.min(1, keepdims=True) / 63 + _LEAST)
    scale, minimum = _codes(step, d, 63, 0), _codes(-low, m, 63, 0)
    shifted = runs + (m * minimum)[:, :, None]
    codes = _codes(shifted, (d * scale)[:, :, None], most, 0)
    packed = [
        scale[:, :4] | scale[:, 4:] >> 4 << 6,
        minimum[:, :4] | minimum[:, 4:] >> 4 << 6,
        scale[:, 4:] & 15 | minimum[:, 4:] << 4,
    ]
    return np.concatenate([stored_d, stored_m, *packed], 1), codes


def _pairs_of_runs(codes: Bytes) -> Bytes:
    """Low bits of codes [n, 8, 32]: each byte holds one of a run, and one of the next run."""
    return _nibbles(codes.reshape(-1, 4, 64)).reshape(-1, 128)


def _q4_k(values: Floats) -> Bytes:
    head, codes = _runs_k(values, 15)
    return np.concatenate([head, _pairs_of_runs(codes)], 1)


def _q5_k(values: Floats) -> Bytes:
    head, codes = _runs_k(values, 31)
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")[:, 0]  # a bit for each run
    return np.concatenate([head, fifth, _pairs_of_runs(codes)], 1)


def _q6_k(values: Floats) -> Bytes:
    runs = values.reshape(-1, 16, 16)
    step = _signed_largest(runs)[:, :, 0] / -32
    d, stored = _half(np.abs(step).max(1, keepdims=True) / 127 + _LEAST)
    scale = np.clip(np.rint(step / d), -128, 127).astype(np.int8)
    codes = _codes(runs, (d * scale)[:, :, None], 63, 32).reshape(-1, 2, 4, 32)
    low = _nibbles(codes.reshape(-1, 2, 128)).reshape(-1, 128)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce(codes >> 4 << shifts, axis=2).reshape(-1, 64)
    return np.concatenate([low, high, scale.view(np.uint8), stored], 1)


WRITTEN_BLOCKS: Mapping[str, WrittenBlocks] = {
    "Q4_0": WrittenBlocks(2, 32, _q4_0, 1.01 / 8),
    "Q4_1": WrittenBlocks(3, 32, _q4_1, 1.02 / 15),
    "Q5_0": WrittenBlocks(6, 32, _q5_0, 1.01 / 16),
    "Q5_1": WrittenBlocks(7, 32, _q5_1, 1.02 / 31),
    "Q8_0": WrittenBlocks(8, 32, _q8_0, 0.51 / 127),
    "Q4_K": WrittenBlocks(12, 256, _q4_k, 1.7 / 15),
    "Q5_K": WrittenBlocks(13, 256, _q5_k, 1.7 / 31),
    "Q6_K": WrittenBlocks(14, 256, _q6_k, 1.2 / 32),
}
"""By ggml's names."""
