"""Turn the blocks of GGUF's tensor types into float32.

A row of a tensor is a run of blocks, each with its own scales. The layouts are ggml's, from
ggml-common.h; in what follows `d` and `m` are float16, `q` is a quantized value:

    F32 F16 BF16    the value
    Q4_0   32 values   d, 16 bytes of q                           (q - 8) * d
    Q4_1   32 values   d, m, 16 bytes of q                        q * d + m
    Q5_0   32 values   d, 4 bytes of fifth bits, 16 of q          (q - 16) * d
    Q5_1   32 values   d, m, 4 bytes of fifth bits, 16 of q       q * d + m
    Q8_0   32 values   d, 32 signed bytes                         q * d
    Q4_K  256 values   d, m, 12 bytes of scales, 128 of q         q * d * scale - m * minimum
    Q5_K  256 values   d, m, 12 bytes of scales, 32 of fifth      the same
                       bits, 128 of q
    Q6_K  256 values   128 bytes of low bits, 64 of high bits,    (q - 32) * d * scale
                       16 signed scales, d

Q4 and Q5 hold value i in the low half of byte i and value i + 16 in the high half. The K types do
so within 64 values (Q4_K, Q5_K) or 128 (Q6_K), and have one scale for each 32 or 16 values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BlockType:
    """How one type stores values."""

    name: str
    block_size: int
    """Values in a block."""
    block_bytes: int
    unpack: Callable[[Bytes], Floats]
    """From blocks [n, block_bytes] to values [n, block_size]."""

    def dequantize(self, rows: Bytes) -> Floats:
        """Values [num_rows, row size] of stored rows [num_rows, row bytes]."""
        blocks = np.ascontiguousarray(rows).reshape(-1, self.block_bytes)
        with np.errstate(invalid="ignore", over="ignore"):  # a broken scale makes its values NaN
            return self.unpack(blocks).reshape(len(rows), -1)


def _float16(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of each block, [n, 1]."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _halves(packed: Bytes) -> Bytes:
    """Low halves of the bytes in the last axis, then the high ones: [..., w] to [..., 2 * w]."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """Bits [n, 4] as values to add, 0 or 16, [n, 32]."""
    return np.unpackbits(packed, axis=-1, bitorder="little") * np.uint8(16)


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    q = _halves(blocks[:, 2:]).astype(np.float32)
    return (q - 8) * _float16(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    q = _halves(blocks[:, 4:]).astype(np.float32)
    return q * _float16(blocks, 0) + _float16(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    q = (_halves(blocks[:, 6:]) + _fifth_bits(blocks[:, 2:6])).astype(np.float32)
    return (q - 16) * _float16(blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    q = (_halves(blocks[:, 8:]) + _fifth_bits(blocks[:, 4:8])).astype(np.float32)
    return q * _float16(blocks, 0) + _float16(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _float16(blocks, 0)


def _q4_k(blocks: Bytes) -> Floats:
    q = _halves(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _scale_k(blocks, q)


def _q5_k(blocks: Bytes) -> Floats:
    q = _halves(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # Bit s of byte i is the fifth bit of value i in the s-th run of 32.
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    return _scale_k(blocks, q | fifth * np.uint8(16))


def _scale_k(blocks: Bytes, q: Bytes) -> Floats:
    """Apply the two scales of Q4_K and Q5_K to values [n, 8, 32].

    Eight 6-bit scales and eight 6-bit minima share 12 bytes: scales 0-3 in the low bits of bytes
    0-3, minima 0-3 in those of bytes 4-7, and for 4-7 the low four bits in the halves of bytes
    8-11, the high two in the top bits of the bytes before.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    scale = _float16(blocks, 0) * scales
    minimum = _float16(blocks, 2) * minima
    values: Floats = q * scale[:, :, None] - minimum[:, :, None]
    return values.reshape(-1, 256)


def _q6_k(blocks: Bytes) -> Floats:
    low = _halves(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    q = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scale = blocks[:, 192:208].view(np.int8) * _float16(blocks, 208)
    values: Floats = q * scale[:, :, None]
    return values.reshape(-1, 256)


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, _f32),
    1: BlockType("F16", 1, 2, _f16),
    30: BlockType("BF16", 1, 2, _bf16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
}
"""By the number that ggml gives a type."""
