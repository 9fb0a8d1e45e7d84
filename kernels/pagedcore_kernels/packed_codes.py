"""Turn words of packed codes into weights, in registers.

    words     [..., 32]     int16, as in `packed_layout`
    zero      [..., 1]      int16, where codes count from more than one number
    result    four tiles [..., 32] of one type: the quarters of a block

On a GPU a register holds two words, and a few instructions make four registers of two weights each:
the bits of a code become the lowest bits of the fraction of 128 (bfloat16) or 1,024 (float16),
whose unit is 1 there, and the subtraction of that number and of the zero is exact. For eight bits
in bfloat16 the number is 2 ** 23, in float32. Elsewhere, and in float32, the same comes from
arithmetic that triton compiles.
"""

import struct
from functools import cache

import triton
import triton.language as tl

MAGIC = {"bf16": 0x4300, "f16": 0x6400}
"""The bits of UNITS."""

UNITS = {"bf16": 128, "f16": 1024}
"""Numbers whose last bit counts 1."""

ONE = {"bf16": 0x3F80, "f16": 0x3C00}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of float4, as MXFP4 has them."""

FLOAT8 = "float8"
"""In the place of a table: codes are those of float8 (e4m3), none of them NaN."""

Table = tuple[float, ...] | str | None
"""What codes of 4 bits stand for, FLOAT8, or themselves."""


def assembly(bits: int, dtype: str, zero: int | None, table: Table) -> str:
    """PTX that unpacks one register: for x of dtype bf16 or f16; "" where there is none.

    Operands are the four results, then the words ($4, and $5 with 8 bits), then the zeros where
    `zero` is None.
    """
    if dtype not in MAGIC:
        return ""
    if table == E2M1:
        return _float4(dtype)
    if table == FLOAT8:
        return _float8(dtype)
    if table is not None:
        assert not isinstance(table, str)
        return _looked_up(dtype, table)
    return _nibbles(dtype, zero) if bits == 4 else _bytes(dtype, zero)


def _twice(half: int) -> str:
    return f"0x{half:04X}{half:04X}"


def _half(value: float, dtype: str) -> int:
    """The bits of a number that dtype holds exactly."""
    if dtype == "f16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    return int(struct.unpack("<I", struct.pack("<f", value))[0]) >> 16


def _nibbles(dtype: str, zero: int | None) -> str:
    magic = MAGIC[dtype]
    lines = [".reg .b32 one, minus, offset, part;"]
    if zero is None:  # (magic + code) - (magic + zero)
        lines += [
            f"or.b32 offset, $5, {_twice(magic)};",
            f"xor.b32 offset, offset, {_twice(0x8000)};",
        ]
    else:
        lines.append(f"mov.b32 offset, {_twice(_half(-float(UNITS[dtype] + zero), dtype))};")
    lines.append(f"mov.b32 one, {_twice(ONE[dtype])};")
    for quarter in range(4):
        lines += _nibble(dtype, quarter, "part")
        lines.append(f"fma.rn.{dtype}x2 ${quarter}, part, one, offset;")
    return "{" + "\n".join(lines) + "}"


def _nibble(dtype: str, quarter: int, target: str) -> list[str]:
    """Two codes of a register, as the last bits of UNITS; `part` is written on the way."""
    lines, source = [], "$4"
    if quarter:
        lines.append(f"shr.b32 part, $4, {4 * quarter};")
        source = "part"
    return [*lines, f"lop3.b32 {target}, {source}, 0x000F000F, {_twice(MAGIC[dtype])}, 0xEA;"]


@cache
def codes_assembly(dtype: str) -> str:
    """PTX that makes a register of words into four, of codes of 4 bits plus UNITS of bf16 or f16.

    Operands are the four results, then the words ($4).
    """
    lines = [".reg .b32 part;"]
    for quarter in range(4):
        lines += _nibble(dtype, quarter, f"${quarter}")
    return "{" + "\n".join(lines) + "}"


def _bytes(dtype: str, zero: int | None) -> str:
    lines = []
    if dtype == "f16":
        lines.append(".reg .b32 one, offset, part;")
        if zero is None:
            lines += ["or.b32 offset, $6, 0x64006400;", "xor.b32 offset, offset, 0x80008000;"]
        else:
            lines.append(f"mov.b32 offset, {_twice(_half(-float(1024 + zero), dtype))};")
        lines.append("mov.b32 one, 0x3C003C00;")
        for quarter in range(4):
            word = f"${4 + quarter // 2}"
            if quarter % 2:
                lines.append(f"shr.b32 part, {word}, 8;")
                word = "part"
            lines.append(f"lop3.b32 part, {word}, 0x00FF00FF, 0x64006400, 0xEA;")
            lines.append(f"fma.rn.f16x2 ${quarter}, part, one, offset;")
        return "{" + "\n".join(lines) + "}"
    lines.append(".reg .b32 magic, low, high;\n.reg .f32 offset, first, second;")
    if zero is None:
        lines += [
            "and.b32 low, $6, 0x000000FF;",
            "or.b32 low, low, 0xCB000000;",
            "mov.b32 offset, low;",
        ]
    else:
        bits = struct.unpack("<I", struct.pack("<f", -(2.0**23) - zero))[0]
        lines.append(f"mov.b32 offset, 0x{bits:08X};")
    lines.append("mov.b32 magic, 0x4B000000;")
    for quarter in range(4):
        word, byte = f"${4 + quarter // 2}", quarter % 2
        lines += [
            f"prmt.b32 low, {word}, magic, 0x744{byte};",
            f"prmt.b32 high, {word}, magic, 0x744{byte + 2};",
            "mov.b32 first, low;",
            "mov.b32 second, high;",
            "add.rn.f32 first, first, offset;",
            "add.rn.f32 second, second, offset;",
            f"cvt.rn.bf16x2.f32 ${quarter}, second, first;",
        ]
    return "{" + "\n".join(lines) + "}"


def _float4(dtype: str) -> str:
    """Sign, two bits of exponent and one of fraction: those of a tiny number, times a large one."""
    last = {"bf16": 6, "f16": 9}[dtype]  # where the bit of the fraction belongs
    large = _twice(_half(2.0**126 if dtype == "bf16" else 2.0**14, dtype))
    lines = [f".reg .b32 large, zero, sign, rest;\nmov.b32 large, {large};\nmov.b32 zero, 0;"]
    for quarter in range(4):
        shift = last - 4 * quarter
        direction = "shl" if shift >= 0 else "shr"
        lines += [
            f"{direction}.b32 rest, $4, {abs(shift)};",
            f"shl.b32 sign, $4, {12 - 4 * quarter};",
            f"and.b32 rest, rest, {_twice(7 << last)};",
            "lop3.b32 rest, sign, 0x80008000, rest, 0xEA;",
            f"fma.rn.{dtype}x2 ${quarter}, rest, large, zero;",
        ]
    return "{" + "\n".join(lines) + "}"


def _float8(dtype: str) -> str:
    """As float4, with four bits of exponent and three of fraction."""
    last = {"bf16": 4, "f16": 7}[dtype]
    large = _twice(_half(2.0**120 if dtype == "bf16" else 2.0**8, dtype))
    lines = [f".reg .b32 large, zero, sign, rest;\nmov.b32 large, {large};\nmov.b32 zero, 0;"]
    for quarter in range(4):
        word, shift = f"${4 + quarter // 2}", last - 8 * (quarter % 2)
        lines += [
            f"{'shl' if shift >= 0 else 'shr'}.b32 rest, {word}, {abs(shift)};",
            f"shl.b32 sign, {word}, {8 - 8 * (quarter % 2)};",
            f"and.b32 rest, rest, {_twice(127 << last)};",
            "lop3.b32 rest, sign, 0x80008000, rest, 0xEA;",
            f"fma.rn.{dtype}x2 ${quarter}, rest, large, zero;",
        ]
    return "{" + "\n".join(lines) + "}"


def _looked_up(dtype: str, table: tuple[float, ...]) -> str:
    """Bytes of the table lie in eight registers, and permutations of bytes pick them by code."""
    halves = [_rounded(value, dtype) for value in table]
    lines = [
        ".reg .b32 t<8>, own, other, pick, a, b, la, ha, lb, hb, a01, a23, b01, b23;",
    ]
    for part in range(2):  # low bytes, then high ones
        picked = [half >> (8 * part) & 0xFF for half in halves]
        for four in range(4):
            value = int.from_bytes(bytes(picked[4 * four : 4 * four + 4]), "little")
            lines.append(f"mov.b32 t{4 * part + four}, 0x{value:08X};")
    for name, word in (("a", "$4"), ("b", "other")):
        if name == "b":
            lines.append("shr.b32 other, $4, 16;")
        lines += [
            f"and.b32 own, {word}, 0x7777;",
            f"shr.b32 pick, {word}, 1;",
            "lop3.b32 pick, pick, 0x4444, 0x3210, 0xEA;",
        ]
        for part, target in ((0, f"l{name}"), (1, f"h{name}")):
            base = 4 * part
            lines += [
                f"prmt.b32 a, t{base}, t{base + 1}, own;",
                f"prmt.b32 b, t{base + 2}, t{base + 3}, own;",
                f"prmt.b32 {target}, a, b, pick;",
            ]
        lines += [
            f"prmt.b32 {name}01, l{name}, h{name}, 0x5140;",
            f"prmt.b32 {name}23, l{name}, h{name}, 0x7362;",
        ]
    for quarter in range(4):
        pair = "01" if quarter < 2 else "23"
        selector = "0x7632" if quarter % 2 else "0x5410"
        lines.append(f"prmt.b32 ${quarter}, a{pair}, b{pair}, {selector};")
    return "{" + "\n".join(lines) + "}"


def _rounded(value: float, dtype: str) -> int:
    if dtype == "f16":
        return _half(value, dtype)
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


@triton.jit
def _plain(code, zero, TABLE: tl.constexpr, DTYPE: tl.constexpr):
    """What codes stand for, before their scale."""
    if TABLE is None:
        value = (code.to(tl.int16) - zero).to(tl.float32)
    elif TABLE == "float8":  # its exponent counts 2 ** -7, that of float32 counts 2 ** -127
        bits = ((code & 127).to(tl.int32) << 20) | ((code & 128).to(tl.int32) << 24)
        value = bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
    else:
        value = tl.zeros_like(code).to(tl.float32)
        for index in tl.static_range(16):
            value = tl.where(code == index, TABLE[index], value)
    return value.to(DTYPE)


@triton.jit
def unpack(
    words,
    more,
    zero,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    START: tl.constexpr,
    TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """The four quarters of a tile of words in DTYPE; `more` are the second words of 8 bits.

    Codes count from `zero` if HAS_ZEROS, and from START otherwise.
    """
    if ASSEMBLY != "":
        if BITS == 4 and HAS_ZEROS:
            bits = tl.inline_asm_elementwise(
                ASSEMBLY, "=r,=r,=r,=r,r,r", [words, zero], (tl.int16,) * 4, True, 2
            )
        elif BITS == 4:
            bits = tl.inline_asm_elementwise(
                ASSEMBLY, "=r,=r,=r,=r,r", [words], (tl.int16,) * 4, True, 2
            )
        elif HAS_ZEROS:
            bits = tl.inline_asm_elementwise(
                ASSEMBLY, "=r,=r,=r,=r,r,r,r", [words, more, zero], (tl.int16,) * 4, True, 2
            )
        else:
            bits = tl.inline_asm_elementwise(
                ASSEMBLY, "=r,=r,=r,=r,r,r", [words, more], (tl.int16,) * 4, True, 2
            )
        result = (
            bits[0].to(DTYPE, bitcast=True),
            bits[1].to(DTYPE, bitcast=True),
            bits[2].to(DTYPE, bitcast=True),
            bits[3].to(DTYPE, bitcast=True),
        )
    else:
        start = zero if HAS_ZEROS else START
        if BITS == 4:
            result = (
                _plain(words & 15, start, TABLE, DTYPE),
                _plain((words >> 4) & 15, start, TABLE, DTYPE),
                _plain((words >> 8) & 15, start, TABLE, DTYPE),
                _plain((words >> 12) & 15, start, TABLE, DTYPE),
            )
        else:
            result = (
                _plain(words & 255, start, TABLE, DTYPE),
                _plain((words >> 8) & 255, start, TABLE, DTYPE),
                _plain(more & 255, start, TABLE, DTYPE),
                _plain((more >> 8) & 255, start, TABLE, DTYPE),
            )
    return result
