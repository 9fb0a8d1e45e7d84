"""How products with packed weights are cut, by shape."""

from dataclasses import dataclass

MIN_ROWS = 8
"""Of a matrix product on tensor cores, where the weight is its left factor."""

MAX_ROWS = 128
"""Of one program; more rows take more programs."""

MAX_PACKED_ROWS = 256
"""Above, a weight is widened first, and multiplied by the vendor's library."""


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """Each program takes bn outputs, and 1 / parts of the blocks of their inputs.

    With more than one of `slices`, groups of warps share the blocks among them; with as many as
    there are blocks, all of them are under way at once. A dependent kernel with `prefetch` asks for
    so many blocks of each slice before it waits; if it is `early`, the next one may start when it
    does, and otherwise when it has all its sums.
    """

    bn: int = 128
    slices: int = 1
    parts: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 8
    early: bool = True


def choose_plan(m: int, n: int, k: int) -> PackedPlan | None:
    """The plan for m rows with a weight [n, k]; None where widening it first is faster."""
    if m > MAX_PACKED_ROWS:
        return None
    blocks = -(-k // 128)
    if m > 32:
        return PackedPlan(128, 1, _parts(n, 128, blocks, 264), 8, 3)
    return PackedPlan(128, 1, _parts(n, 128, blocks, 396), 4, 5)


def _parts(n: int, bn: int, blocks: int, programs: int) -> int:
    """Parts of the blocks, so that about so many programs share the work."""
    tiles = -(-n // bn)
    parts = 1
    while parts < 16 and tiles * parts * 2 <= programs * 4 // 3 and blocks >= parts * 4:
        parts *= 2
    return parts


def rows_per_program(m: int) -> int:
    """Rows that a program's tile has room for."""
    rows = MIN_ROWS
    while rows < min(m, MAX_ROWS):
        rows *= 2
    return rows
