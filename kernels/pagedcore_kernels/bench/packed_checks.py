"""Products with packed weights against plain torch: every format, in every type."""

from collections.abc import Iterator

import torch

from pagedcore.execution.kernel_bench import Check
from pagedcore.execution.quantized import Grouped
from pagedcore.execution.torch_quantized import widen_grouped
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.checks import LIMITS, relative_error
from pagedcore_kernels.packed_codes import E2M1

NUMBERS = tuple(i**3 / 512 - 3 for i in range(16))
"""A table that is no float4."""

FORMATS: dict[str, tuple[int, int, str]] = {
    "4 bits": (4, 128, ""),
    "4 bits, zeros": (4, 128, "zero"),
    "4 bits, minima": (4, 32, "minimum"),
    "float4": (4, 32, "float4"),
    "table": (4, 64, "table"),
    "8 bits": (8, 128, ""),
    "8 bits, zeros": (8, 32, "zero"),
    "8 bits, groups of 16": (8, 16, ""),
}
"""Bits, inputs of a group, and what else there is."""


def check_packed(device: str, *, small: bool = False) -> Iterator[Check]:
    """Run every check; `small` is for triton's interpreter, which multiplies no bfloat16."""
    ops = TritonOps(device)
    n, k = (40, 256) if small else (1000, 4096)
    kinds = [torch.float16] if small else [torch.bfloat16, torch.float16, torch.float32]
    for name, settings in FORMATS.items():
        weight = random_weight(n, k, *settings, device)
        exact = widen_grouped(weight, torch.float32).double()
        for dtype in kinds:
            packed = ops.pack_grouped(weight, dtype)
            for m in (3,) if small else (1, 7, 16, 40, 100, 300):
                x = torch.randn(m, k, device=device).to(dtype)
                error = relative_error(ops.grouped_linear(x, packed), x.double() @ exact.T)
                kind = str(dtype).removeprefix("torch.")
                yield Check(f"packed_linear {kind} {name} T {m}", error, LIMITS[dtype])


def random_weight(n: int, k: int, bits: int, group: int, kind: str, device: str) -> Grouped:
    """Random codes [n, k], with zeros, minima, or the numbers of a table."""
    groups = (n, k // group)
    tables = {"float4": E2M1, "table": NUMBERS}
    zero = torch.randint(2**bits, groups, dtype=torch.uint8, device=device)
    return Grouped(
        codes=torch.randint(256, (n, k * bits // 8), dtype=torch.uint8, device=device),
        scale=(torch.rand(groups, device=device) + 0.5).half(),
        bits=bits,
        zero=zero if kind == "zero" else None,
        minimum=torch.randn(groups, device=device) if kind == "minimum" else None,
        table=torch.tensor(tables[kind], device=device) if kind in tables else None,
    )
