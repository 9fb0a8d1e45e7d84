"""How far from its reference what a model computes may be.

In float32 it must be equal within TOLERANCE. In 16 bits its error may be FACTOR times the one that
the reference itself makes there, at the median row: experts that are chosen otherwise, which
happens where two are about equally good, are no mistake.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Largest difference in float32, as a share of the largest number or of 1."""

FACTOR = 2.0
"""How much worse than the reference's own an error in 16 bits may be."""

SHARE = 0.05
"""Of the numbers, root mean square: the error in 16 bits of a model without a reference."""


@dataclass(slots=True)
class Judge:
    """What numbers [n, ...] of each prompt should be, and how far from it they may be."""

    origin: str
    """Whose they are."""

    expected: list[Tensor]
    exact: bool
    allowed: float

    def error(self, found: Sequence[Tensor]) -> float:
        """How far these are off, to be compared with `allowed`."""
        return error_of(found, self.expected, exact=self.exact)


def error_of(found: Sequence[Tensor], expected: Sequence[Tensor], *, exact: bool) -> float:
    """`exact`: the largest difference; otherwise the root mean square of the median row."""
    difference = torch.cat(list(found)) - torch.cat(list(expected))
    if exact:
        return float(difference.abs().max())
    return float(difference.square().mean(-1).sqrt().median())


def judge_by_transformers(
    run: Callable[[Any], list[Tensor]], reference: Any, dtype: torch.dtype
) -> Judge:
    """By what `run` makes of a model of transformers, which is in float32 and becomes `dtype`."""
    expected = run(reference)
    if dtype == torch.float32:
        largest = max(1.0, max(float(part.abs().max()) for part in expected))
        return Judge("transformers", expected, True, TOLERANCE * largest)
    own = error_of(run(reference.to(dtype)), expected, exact=False)
    return Judge("transformers", expected, False, FACTOR * own)


def judge_by_itself(expected: list[Tensor], dtype: torch.dtype) -> Judge:
    """By its own numbers for whole prompts in float32, on plain torch."""
    flat = torch.cat(expected)
    if dtype == torch.float32:
        largest = max(1.0, float(flat.abs().max()))
        return Judge("its own whole prompts", expected, True, TOLERANCE * largest)
    allowed = SHARE * float(flat.square().mean().sqrt())
    return Judge("its own whole prompts in float32", expected, False, allowed)
