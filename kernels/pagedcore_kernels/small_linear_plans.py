"""How products of a few rows are cut, by shape: what `bench/linear_sampling.py --tune` found."""

from dataclasses import dataclass

MAX_ROWS = 64
"""Above, the vendor's library is as fast."""

MAX_SCALED_ROWS = 16
"""Of products with 8-bit weights. With 32 rows, Llama-8B decoded 4,852 tokens/s on an H200 this
way, fewer than in 16 bits (5,953): there the vendor's product of rounded rows takes over. From two
rows on, `block_fp8` is faster still: it multiplies rows that it rounds in groups."""
MIN_DOT_ROWS = 16  # of a matrix product on tensor cores
MAX_DOT_ROWS = 128  # of one program; more rows take more programs
GROUP_COLUMNS = 128  # that share a scale, where a weight has more than one for each output


@dataclass(frozen=True, slots=True)
class RowPlan:
    """For one row: each program takes bn weight rows, and loads bk * unroll columns at once."""

    bn: int = 4
    bk: int = 1024
    num_warps: int = 4
    unroll: int = 1


@dataclass(frozen=True, slots=True)
class DotPlan:
    """For a few rows: each program takes bn weight rows and 1 / parts of their columns.

    Its warps share that among them in `slices`, and load bk columns of each slice at a time.
    """

    bn: int = 16
    bk: int = 64
    slices: int = 4
    parts: int = 1
    num_warps: int = 4
    num_stages: int = 4


Plan = RowPlan | DotPlan

_MIN_WEIGHTS = 2**19
"""Below, everything is launch latency, and no plan helps."""


def choose_plan(m: int, n: int, k: int) -> Plan | None:
    """The plan for m rows with a weight [n, k]; None where the vendor's library is as fast."""
    if not 1 <= m <= MAX_ROWS or n * k < _MIN_WEIGHTS or k % 8:
        return None
    return row_plan(k) if m == 1 else dot_plan(m, n)


def row_plan(k: int) -> RowPlan:
    """Few weight rows per program, and as many columns in flight as registers hold."""
    if k % 2048 == 0:
        return RowPlan(4, 2048, 4, 1)
    if k % 1024 == 0:  # the first 1,024 are under way before the kernel may read x
        return RowPlan(2 if k > 1024 else 4, 1024, 4, 2 if k > 1024 else 1)
    return RowPlan(4, 512, 2, 1)


def dot_plan(m: int, n: int) -> DotPlan | None:
    """Narrow tiles where there are few outputs: the library leaves processors idle there."""
    if m > 32 or n > 2048:
        return None
    return DotPlan(8, 128, 4, 1, 4, 3)


def default_plan(m: int) -> Plan:
    """What is right for any shape, and fast for none in particular."""
    if m == 1:
        return RowPlan()
    return DotPlan() if m <= MAX_ROWS else DotPlan(128, 64, 1, 1, 8, 3)


def choose_scaled_plan(m: int, n: int, k: int) -> Plan | None:
    """As `choose_plan`, for weights of 8 bits; None where quantizing the rows, too, is faster."""
    if not 1 <= m <= MAX_SCALED_ROWS or k % 16:
        return None
    if m == 1:
        return RowPlan(4, 2048, 4, 1) if k % 2048 == 0 else RowPlan(4, 1024, 2, 1)
    return DotPlan(16 if n <= 8192 else 32, 64, 4, 1, 4, 4)
