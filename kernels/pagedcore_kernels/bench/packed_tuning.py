"""Search for the best plans of products with packed weights, and keep them on disk.

M rows   N outputs   K inputs
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from triton.errors import TritonError

from pagedcore.execution.kernel_bench import Trial
from pagedcore.execution.quantized import Grouped
from pagedcore_kernels import packed_strips
from pagedcore_kernels.bench.clock import num_rotations, time_calls
from pagedcore_kernels.dependent import can_depend
from pagedcore_kernels.packed_layout import Packed, pack
from pagedcore_kernels.packed_linear import linear
from pagedcore_kernels.packed_plans import PackedPlan, candidate_plans
from pagedcore_kernels.packed_widen import multiply_widened
from pagedcore_kernels.small_linear import Scratch
from pagedcore_kernels.tuned_plans import case_of, save_plans

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""[N, K] of the linear layers of Llama-3.1-8B."""

ROWS = (1, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Widened:
    """Widen the weight first, and let the vendor's library multiply."""


@dataclass(frozen=True, slots=True)
class PackedCase:
    """A product: M rows with a weight [N, K] of some bits, with zeros or without."""

    m: int
    n: int
    k: int
    bits: int = 4
    zeros: bool = False
    group: int = 128


def packed_cases(*, small: bool) -> list[PackedCase]:
    """Every shape in the formats that are met most."""
    if small:
        return [PackedCase(2, 32, 1024)]
    kinds = ((4, False), (4, True), (8, False))
    return [PackedCase(m, *shape, *kind) for kind in kinds for shape in SHAPES for m in ROWS]


def random_weight(case: PackedCase, device: str) -> Packed:
    """A weight of random codes."""
    groups = (case.n, case.k // case.group)
    shape = (case.n, case.k * case.bits // 8)
    weight = pack(
        Grouped(
            codes=torch.randint(256, shape, dtype=torch.uint8, device=device),
            scale=torch.rand(groups, device=device).half(),
            bits=case.bits,
            zero=torch.randint(2**case.bits, groups, dtype=torch.uint8, device=device)
            if case.zeros
            else None,
        )
    )
    assert weight is not None, "groups of 128 have a layout"
    return weight


def tune_packed(
    cases: list[PackedCase], device: str, dtype: torch.dtype, path: Path | None
) -> Iterator[Trial]:
    """Time every plan in every case, and write the best of each to `path`.

    Cases that `packed_strips` multiplies have nothing to search for, and are left out.
    """
    scratch = Scratch(torch.device(device))
    dependent = can_depend(torch.device(device))
    streams = packed_strips.can_run(torch.device(device))
    for case in cases:
        weight = random_weight(case, device)
        if streams and packed_strips.choose(case.m, weight, dtype) is not None:
            continue
        weights = [
            replace(weight, codes=torch.randint_like(weight.codes, -(2**15), 2**15))
            for _ in range(num_rotations(weight.num_bytes))
        ]
        x = torch.randn(case.m, case.k, device=device).to(dtype)
        name = case_of(case.m, weight)
        rates: dict[PackedPlan | None, float] = {}
        for plan in candidate_plans(case.m, *weight.shape, weight.quarter):
            multiply = (
                multiply_widened
                if plan is None
                else partial(linear, scratch=scratch, plan=plan, dependent=dependent)
            )
            calls = [partial(multiply, x, other) for other in weights]
            try:
                passed = time_calls(calls, budget_s=0.02)
            except TritonError:  # does not fit
                continue
            rates[plan] = weight.num_bytes / passed.median * 1e6
            yield Trial(name, Widened() if plan is None else plan, rates[plan])
        if path is not None and rates:
            _keep(path, name, rates)


def _keep(path: Path, case: str, rates: Mapping[PackedPlan | None, float]) -> None:
    best = max(rates, key=lambda plan: rates[plan])
    save_plans(path, {case: best})
