"""What a backend may offer besides its operations: to check its own kernels, and to time them.

`pagedcore bench kernels` asks for it. A backend that offers it has one more method, `kernel_bench`:
see `Measured`. Rates are bytes or floating-point operations per second, in all of this.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Unit = Literal["B/s", "FLOP/s"]


@dataclass(frozen=True, slots=True)
class Time:
    """Microseconds of one call."""

    median: float
    least: float
    p99: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class Check:
    """How far a kernel is from the plain operation."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN never is."""
        return self.error <= self.limit


@dataclass(frozen=True, slots=True)
class Figure:
    """What one kernel achieves in one case."""

    kernel: str
    case: str
    time: Time
    rate: float
    """At the median."""

    unit: Unit


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting of a kernel in one case."""

    case: str
    config: object
    """A dataclass, as the kernel takes it."""

    rate: float


class KernelBench(Protocol):
    """Measures the kernels of one backend, on its device."""

    tunable: tuple[str, ...]
    """Kernels whose settings can be searched."""

    def ceilings(self) -> Mapping[Unit, float]:
        """What the device does at best, measured here and now: a copy, and a matrix product."""
        ...

    def checks(self) -> Iterator[Check]:
        """Compare each kernel with the plain operation."""
        ...

    def figures(self) -> Iterator[Figure]:
        """Time each kernel in each of its cases."""
        ...

    def trials(self, kernel: str) -> Iterator[Trial]:
        """Time each setting of one of the `tunable` kernels, in a few cases."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A backend that can measure its kernels."""

    def kernel_bench(self, *, small: bool = False, cache_gib: float = 16.0) -> KernelBench:
        """Make what measures them.

        `small` asks for tiny shapes, which an interpreter can run too, and figures without
        meaning. `cache_gib` bounds the cached keys and values that attention reads.
        """
        ...
