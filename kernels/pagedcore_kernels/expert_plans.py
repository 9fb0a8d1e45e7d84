"""How products with packed experts are cut, by how many assignments an expert has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

SHARED_MEMORY = 232_448
"""Of one program on a Hopper GPU."""

MIN_BM = 8
"""Of a product on tensor cores, where the weight is its left factor."""


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """Each program takes bn outputs of bm assignments of one expert.

    With `scaled`, scales that are powers of two multiply weights instead of the sums of a group:
    of many assignments that is less work.
    """

    bm: int
    bn: int
    num_warps: int
    num_stages: int
    scaled: bool = False


def choose_plan(num_assignments: int, num_experts: int, has_powers: bool = False) -> ExpertPlan:
    """The plan for so many assignments: tiles are small while experts have few of them.

    `has_powers`: scales are powers of two. What `bench/packed_experts.py` found on an H200.
    """
    per_expert = num_assignments / num_experts
    if per_expert <= 2:
        return ExpertPlan(8, 128, 4, 5)
    if per_expert <= 8:
        return ExpertPlan(16, 128, 4, 4)
    if per_expert <= 24:
        return ExpertPlan(32, 128, 4, 4, scaled=True)
    if per_expert <= 64 or not has_powers:
        return ExpertPlan(64, 128, 4, 3, scaled=True)
    return ExpertPlan(128, 128, 4, 3, scaled=True)


def fit(plan: ExpertPlan, of_weight: int, of_rows: int, shared_memory: int) -> ExpertPlan:
    """The plan, with as many stages and assignments as shared memory has room for.

    A block has `of_weight` bytes for each output, and `of_rows` for each assignment.
    """
    while plan.num_stages * (plan.bn * of_weight + plan.bm * of_rows) > shared_memory:
        if plan.num_stages > 2:
            plan = replace(plan, num_stages=plan.num_stages - 1)
        elif plan.bm > MIN_BM:
            plan = replace(plan, bm=plan.bm // 2)
        else:
            break
    return plan


def candidate_plans(
    num_assignments: int, num_experts: int, has_powers: bool = False
) -> Iterator[ExpertPlan]:
    """Plans worth a try, `choose_plan`'s first."""
    yield choose_plan(num_assignments, num_experts, has_powers)
    per_expert = num_assignments / num_experts
    if per_expert <= 2:
        yield from [
            ExpertPlan(8, 32, 2, 6),
            ExpertPlan(8, 32, 4, 4),
            ExpertPlan(8, 64, 4, 6),
            ExpertPlan(8, 64, 4, 4),
        ]
    elif per_expert <= 8:
        yield from [
            ExpertPlan(8, 64, 4, 5),
            ExpertPlan(16, 32, 4, 6),
            ExpertPlan(16, 64, 4, 3),
            ExpertPlan(16, 64, 4, 5),
            ExpertPlan(32, 64, 4, 4),
        ]
    elif per_expert <= 24:
        yield from [
            ExpertPlan(16, 128, 4, 4),
            ExpertPlan(32, 64, 4, 4),
            ExpertPlan(32, 128, 4, 4),
            ExpertPlan(32, 128, 8, 4),
            ExpertPlan(64, 128, 4, 4, scaled=True),
        ]
    else:
        yield from [
            ExpertPlan(32, 128, 4, 4, scaled=True),
            ExpertPlan(64, 64, 4, 4, scaled=True),
            ExpertPlan(64, 128, 4, 3, scaled=True),
            ExpertPlan(64, 128, 8, 4, scaled=True),
            ExpertPlan(64, 256, 8, 3, scaled=True),
            ExpertPlan(128, 128, 4, 3, scaled=True),
            ExpertPlan(128, 128, 8, 3, scaled=True),
            ExpertPlan(128, 256, 8, 3, scaled=True),
        ]
