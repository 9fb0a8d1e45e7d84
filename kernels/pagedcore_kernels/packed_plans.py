"""How products with packed weights are cut, by shape: what `bench/packed_linear.py` found."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

MIN_ROWS = 8
"""Of a matrix product on tensor cores, where the weight is its left factor."""

MAX_ROWS = 128
"""Of one program; more rows take more programs."""

MAX_PACKED_ROWS = 256
"""Above, a weight is widened first, and multiplied by the vendor's library."""

SHARED_MEMORY = 232_448
"""Of one program on a Hopper GPU, on which the plans were measured."""

_MANY_OUTPUTS = 16384
"""From here on there are tiles enough for all processors, and blocks are best small."""


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """Each program takes bn outputs, and 1 / parts of the blocks of their inputs.

    With more than one of `slices`, groups of warps share the blocks among them; with as many as
    there are blocks, all of them are under way at once. A dependent kernel with `prefetch` asks for
    so many blocks of each slice before it waits; if it is `early`, the next one may start when it
    does, and otherwise when it has all its sums. With `halves`, a step takes half of each quarter:
    of many rows, more steps are under way then.
    """

    bn: int = 128
    slices: int = 1
    parts: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 0
    early: bool = False
    halves: bool = False


def is_plan(plan: PackedPlan) -> bool:
    """Whether a kernel can be cut like this, on some device."""
    powers = (plan.bn, plan.slices, plan.parts, plan.num_warps)
    return (
        all(value > 0 and not value & (value - 1) for value in powers)
        and 16 <= plan.bn <= 256
        and plan.slices <= 32
        and plan.parts <= 32
        and plan.num_warps <= 16
        and 1 <= plan.num_stages <= 8
        and 0 <= plan.prefetch <= 64
    )


def best_quarter(n: int) -> int:
    """Inputs of a quarter of a block, for weights whose groups leave the choice."""
    return 32 if n >= _MANY_OUTPUTS else 64


def choose_plan(m: int, n: int, k: int, quarter: int = 32) -> PackedPlan | None:
    """The plan for m rows with a weight [n, k]; None where widening it first is faster."""
    if m > MAX_PACKED_ROWS or (m > 64 and n < _MANY_OUTPUTS and k <= 4096):
        return None
    plan = _for_many_outputs(m) if n >= _MANY_OUTPUTS else _for_few_outputs(m, n, k)
    blocks = max(1, k // (4 * quarter))
    slices = min(plan.slices, _power_of_2_below(blocks))
    parts = min(plan.parts, _power_of_2_below(max(1, blocks // slices)))
    return replace(plan, slices=slices, parts=parts, halves=plan.halves and quarter == 64)


def fit(
    plan: PackedPlan, m: int, of_weight: int, of_rows: int, shared_memory: int = SHARED_MEMORY
) -> PackedPlan | None:
    """The plan, with as many stages and slices as shared memory has room for; None for not one.

    A block has `of_weight` bytes for each output, and `of_rows` for each of the m rows.
    """
    bm = rows_per_program(m)
    if plan.halves:
        of_weight, of_rows = of_weight // 2 + 8, of_rows // 2
    while True:
        behind = plan.num_stages - 1  # stages that are under way while one is multiplied
        is_read_there = plan.slices == 1 and bm >= 16 and plan.bn >= 64 and plan.num_warps >= 4
        buffers = behind * plan.bn * of_weight + (behind + is_read_there) * bm * of_rows
        if plan.slices * buffers <= shared_memory:
            return plan
        if plan.num_stages > 2:
            plan = replace(plan, num_stages=plan.num_stages - 1)
        elif plan.slices > 1:
            plan = replace(plan, slices=plan.slices // 2)
        else:
            return None


def _for_few_outputs(m: int, n: int, k: int) -> PackedPlan:
    if m <= 8:
        if n > 4224:
            return PackedPlan(64, 4, 4, 4, 4)
        return PackedPlan(64, 4, 2, 4, 4) if m > 1 and k > 8192 else PackedPlan(32, 4, 1, 4, 6)
    if m <= 16:
        return PackedPlan(128, 1, _parts(n, 128, 264), 4, 4)
    if m <= 64:
        if k > 8192:
            stages = 3 if m <= 32 else 4
            return PackedPlan(128, 1, _parts(n, 128, 264), 4, stages, halves=m > 32)
        return PackedPlan(64, 1, _parts(n, 64, 264 if m <= 32 else 132), 4, 4)
    parts = _parts(n, 128, 132 if m <= 128 else 66)
    return PackedPlan(128, 1, parts, 8, 3, 8, early=True, halves=True)


def _for_many_outputs(m: int) -> PackedPlan:
    if 1 < m <= 8:
        return PackedPlan(128, 1, 1, 4, 6)
    if m <= 16:
        return PackedPlan(128, 1, 2, 4, 4)
    if m <= 64:
        return PackedPlan(128, 1, 1, 4, 4 if m <= 32 else 3)
    return PackedPlan(128, 1, 1, 8, 4)


def candidate_plans(m: int, n: int, k: int, quarter: int = 32) -> Iterator[PackedPlan | None]:
    """Plans worth a try for m rows with a weight [n, k]; None where widening it may be faster."""
    blocks = -(-k // (4 * quarter))
    if m <= 16:
        cuts = [(32, 4, 1, 4, 6), (32, 4, 2, 4, 5), (64, 4, 1, 4, 4), (64, 4, 2, 4, 4)]
        cuts += [(64, 4, 4, 4, 4), (16, 4, 2, 4, 5), (64, 1, 8, 4, 5)]
        cuts += [(128, 1, parts, 4, stages) for parts in (2, 4, 8) for stages in (4, 6)]
        cuts += [(16, 16, 1, 8, 2), (32, 16, 1, 8, 2)]
    elif m <= 64:
        cuts = [(128, 1, parts, 4, stages) for parts in (1, 2, 4, 8) for stages in (3, 4)]
        cuts += [(64, 1, parts, 4, 4) for parts in (1, 2, 4)]
    else:
        cuts = [(128, 1, parts, 8, stages) for parts in (1, 2, 4) for stages in (3, 4)]
        yield None
    for bn, slices, parts, num_warps, num_stages in cuts:
        if slices * parts > max(blocks, 1) or bn > max(n, 32):
            continue
        yield PackedPlan(bn, slices, parts, num_warps, num_stages)
        if m > 32 and quarter == 64:
            yield PackedPlan(bn, slices, parts, num_warps, num_stages, halves=True)
        if m > 64 or slices >= 16 or (m > 8 and n >= _MANY_OUTPUTS):
            yield PackedPlan(bn, slices, parts, num_warps, num_stages, 8, early=True)


def rows_of_plan(m: int) -> int:
    """The number of rows whose plan m rows share: a power of two."""
    return 1 if m <= 1 else max(MIN_ROWS, 1 << (m - 1).bit_length())


def rows_per_program(m: int) -> int:
    """Rows that a program's tile has room for."""
    return min(max(rows_of_plan(m), MIN_ROWS), MAX_ROWS)


def _parts(n: int, bn: int, programs: int) -> int:
    """Parts of the blocks, a power of two, so that no more than so many programs share the work."""
    return min(8, _power_of_2_below(max(1, programs // -(-n // bn))))


def _power_of_2_below(number: int) -> int:
    """The largest that is no larger."""
    return 1 << (number.bit_length() - 1)
