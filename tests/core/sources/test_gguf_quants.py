"""Every tensor type against ggml's definition, value by value."""

import struct

import numpy as np
import pytest

from pagedcore.sources.gguf_quants import BLOCK_TYPES
from pagedcore.sources.gguf_reader import GgufFile

SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
BY_NAME = {kind.name: kind for kind in BLOCK_TYPES.values()}


def half(block, at):
    return struct.unpack_from("<e", block, at)[0]


def four_bits(block, at, i):
    """Value i of 32 that are stored in 16 bytes from `at` on."""
    return block[at + i] & 15 if i < 16 else block[at + i - 16] >> 4


def fifth_bit(block, at, i):
    return (struct.unpack_from("<I", block, at)[0] >> i & 1) << 4


def simple(name, block):
    d = half(block, 0)
    for i in range(32):
        if name == "Q8_0":
            yield struct.unpack_from("<b", block, 2 + i)[0] * d
        elif name == "Q4_0":
            yield (four_bits(block, 2, i) - 8) * d
        elif name == "Q4_1":
            yield four_bits(block, 4, i) * d + half(block, 2)
        elif name == "Q5_0":
            yield ((four_bits(block, 6, i) | fifth_bit(block, 2, i)) - 16) * d
        elif name == "Q5_1":
            yield (four_bits(block, 8, i) | fifth_bit(block, 4, i)) * d + half(block, 2)


def six_bits(packed, j):
    """Scale and minimum j of eight, out of 12 bytes."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    low = packed[j + 4]
    return low & 15 | packed[j - 4] >> 6 << 4, low >> 4 | packed[j] >> 6 << 4


def q4_or_q5_k(name, block):
    d, dmin = half(block, 0), half(block, 2)
    codes = block[48:] if name == "Q5_K" else block[16:]
    for i in range(256):
        run, within = divmod(i, 32)
        byte = codes[run // 2 * 32 + within]
        q = byte >> 4 if run % 2 else byte & 15
        if name == "Q5_K":
            q |= (block[16 + within] >> run & 1) << 4
        scale, minimum = six_bits(block[4:16], run)
        yield q * d * scale - dmin * minimum


def q6_k(block):
    d = half(block, 208)
    for i in range(256):
        big, rest = divmod(i, 128)
        quarter, within = divmod(rest, 32)
        low = block[big * 64 + quarter % 2 * 32 + within]
        low = low >> 4 if quarter >= 2 else low & 15
        high = block[128 + big * 32 + within] >> 2 * quarter & 3
        scale = struct.unpack_from("<b", block, 192 + i // 16)[0]
        yield ((low | high << 4) - 32) * d * scale


def reference(name, block):
    if name in SIMPLE:
        return list(simple(name, block))
    return list(q6_k(block)) if name == "Q6_K" else list(q4_or_q5_k(name, block))


def random_rows(kind, num_rows, num_blocks, seed=0):
    """Random bits with scales that are small numbers, and neither infinite nor NaN."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_rows * num_blocks, kind.block_bytes), np.uint8)
    places = {"Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}.get(kind.name, (0, 2))
    for at in places:
        scales = rng.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(num_rows, -1)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name.startswith("Q")])
def test_a_quantized_type_is_what_ggml_defines(name):
    kind = BY_NAME[name]
    rows = random_rows(kind, 5, 3)

    values = kind.dequantize(rows)

    blocks = rows.reshape(-1, kind.block_bytes)
    expected = [reference(name, block.tobytes()) for block in blocks]
    assert values.dtype == np.float32
    assert values.shape == (5, 3 * kind.block_size)
    np.testing.assert_allclose(values, np.reshape(expected, values.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("F32", "<f4"), ("F16", "<f2")])
def test_a_plain_type_is_read_as_it_is(name, dtype):
    values = np.random.default_rng(1).standard_normal((4, 7)).astype(dtype)
    read = BY_NAME[name].dequantize(np.ascontiguousarray(values).view(np.uint8))
    np.testing.assert_array_equal(read, values.astype(np.float32))


def test_bfloat16_is_the_upper_half_of_float32():
    values = np.array([[1.0, -2.5, 3.140625, float("inf")]], np.float32)
    upper = np.ascontiguousarray(values).view("<u2")[:, 1::2]
    read = BY_NAME["BF16"].dequantize(np.ascontiguousarray(upper).view(np.uint8))
    np.testing.assert_array_equal(read, values)


def test_a_quantized_tensor_keeps_its_rows_through_a_file(tmp_path, writer):
    rows = random_rows(BY_NAME["Q4_K"], 6, 2)
    writer.tensor("w", rows.tobytes(), 12, shape=(2, 3, 512))

    file = GgufFile.open(writer.save(tmp_path / "x.gguf"))

    assert file.tensors["w"].shape == (2, 3, 512)
    np.testing.assert_array_equal(file.rows(file.tensors["w"]), rows)


def test_a_broken_scale_gives_no_warning():
    kind = BY_NAME["Q4_0"]
    block = np.full((1, kind.block_bytes), 0x88, np.uint8)
    block[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    assert np.isnan(kind.dequantize(block)).all()
