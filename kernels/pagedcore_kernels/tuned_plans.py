"""Plans of packed products that were measured on this machine, kept on disk.

$PAGEDCORE_CACHE/plans/<device>-<triton's version>.json
    {"version": 2, "packed": {"<case>": [bn, slices, parts, ...] or null}}

`pagedcore bench kernels --tune packed` writes the file; the backend reads it when it starts. A file
that cannot be read, or holds what no plan may be, counts as none, with a warning: then plans come
from `packed_plans`, as on a machine where nothing was measured.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import torch
import triton

from pagedcore.sources.cache import cache_root
from pagedcore_kernels.packed_layout import Packed
from pagedcore_kernels.packed_plans import (
    MAX_PACKED_ROWS,
    PackedPlan,
    choose_plan,
    is_plan,
    rows_of_plan,
)

logger = logging.getLogger(__name__)

VERSION = 2
"""Of the kernel: plans for another are forgotten."""

MAX_BYTES = 1 << 22
"""A larger file was not written here."""


class TunedPlans:
    """The plans for one device."""

    def __init__(self, plans: Mapping[str, PackedPlan | None]) -> None:
        """A case without a plan is faster widened."""
        self._plans = dict(plans)

    def choose(self, num_rows: int, weight: Packed) -> PackedPlan | None:
        """The plan for so many rows with a weight; None where widening it first is faster."""
        if self._plans and num_rows <= MAX_PACKED_ROWS:
            case = case_of(num_rows, weight)
            if case in self._plans:
                return self._plans[case]
        return choose_plan(num_rows, *weight.shape, weight.quarter)


def case_of(num_rows: int, weight: Packed) -> str:
    """The name of all products that share a plan with this one."""
    n, k = weight.shape
    kind = "".join(
        mark
        for mark, is_so in (
            ("z", weight.zero is not None),
            ("m", weight.minimum is not None),
            ("t", weight.numbers is not None),
        )
        if is_so
    )
    return f"m {rows_of_plan(num_rows)} n {n} k {k} bits {weight.bits}{kind} group {weight.group}"


def plans_file(device: torch.device) -> Path:
    """Where the plans for a device are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name} {triton.__version__}".lower()).strip("-")
    return cache_root() / "plans" / f"{slug}.json"


def load_plans(path: Path) -> TunedPlans:
    """The plans in a file; none where it is missing or not to be trusted."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        stored = json.loads(path.read_bytes())
        if stored["version"] != VERSION:
            return TunedPlans({})
        return TunedPlans({str(case): _plan(row) for case, row in stored["packed"].items()})
    except FileNotFoundError:
        return TunedPlans({})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning(
            "%s holds no plans (%s: %s): delete it, or write it anew with "
            "`pagedcore bench kernels --tune packed`",
            path,
            type(error).__name__,
            error,
        )
        return TunedPlans({})


def save_plans(path: Path, plans: Mapping[str, PackedPlan | None]) -> None:
    """Add plans to a file, which is whole at any time; raises OSError where that fails."""
    known = load_plans(path)._plans | dict(plans)
    rows = {case: None if plan is None else astuple(plan) for case, plan in known.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps({"version": VERSION, "packed": rows}, indent=1) + "\n")
    part.replace(path)


def _plan(row: Any) -> PackedPlan | None:
    if row is None:
        return None
    if type(row) is not list or len(row) != len(fields(PackedPlan)):
        raise ValueError(f"{row!r:.80} is no plan")
    types = [type(field.default) for field in fields(PackedPlan)]
    if [type(value) for value in row] != types:
        raise ValueError(f"{row!r:.80} is no plan")
    plan = PackedPlan(*row)
    if not is_plan(plan):
        raise ValueError(f"{plan} is out of bounds")
    return plan
