"""Normalise rows by their root mean square, alone or after adding a residual.

    T tokens   h hidden size

    x, residual, out    [T, h]   h contiguous; T may have any stride; one dtype
    weight              [h]      contiguous

The grid is (T,): one program holds one row in registers, so each element is read once and written
once. `rms_norm` moves 2 * T * h elements; `add_rms_norm` moves 4 * T * h, because it writes the sum
over `residual` and the norm over `x`. Arithmetic is float32; the sum is rounded to the tensors'
dtype before it is normalised, and the result is rounded once.

The norm of a row is whole in one program, so a variant that also finds the row's largest magnitude
and writes 8-bit values with one scale needs no second pass.

`TorchOps.rms_norm` and `TorchOps.add_rms_norm` are the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore_kernels.dependent import can_depend, wait_for_predecessors

MAX_COLUMNS = 65536
"""A row has to fit the registers of one program."""


@triton.jit
def _rms_norm_kernel(
    x,
    weight,
    out,
    x_stride,
    out_stride,
    num_columns,
    eps,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    wait_for_predecessors(DEPENDENT)
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value) / num_columns + eps) * scale
    tl.store(out + row * out_stride + column, normed, inside)


@triton.jit
def _add_rms_norm_kernel(
    x,
    residual,
    weight,
    x_stride,
    residual_stride,
    num_columns,
    eps,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    x += row * x_stride
    residual += row * residual_stride
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    wait_for_predecessors(DEPENDENT)
    value = tl.load(x + column, inside, 0.0).to(tl.float32)
    value += tl.load(residual + column, inside, 0.0).to(tl.float32)
    total = value.to(residual.dtype.element_ty)
    tl.store(residual + column, total, inside)
    value = total.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value) / num_columns + eps) * scale
    tl.store(x + column, normed, inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, num_warps: int | None = None) -> Tensor:
    """Return the scaled norm of each row of x [T, h]; x keeps its values."""
    rows, columns = _check(x, weight)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(columns)
    if rows:
        _rms_norm_kernel[(rows,)](
            x,
            weight,
            out,
            x.stride(0),
            out.stride(0),
            columns,
            eps,
            BLOCK=block,
            DEPENDENT=can_depend(x.device),
            num_warps=num_warps or _num_warps(block),
            launch_pdl=can_depend(x.device),
        )
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, num_warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Write x + residual [T, h] over residual, its scaled norm over x; return (x, residual)."""
    rows, columns = _check(x, weight)
    assert residual.shape == x.shape and residual.dtype == x.dtype and residual.stride(1) == 1
    block = triton.next_power_of_2(columns)
    if rows:
        _add_rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            x.stride(0),
            residual.stride(0),
            columns,
            eps,
            BLOCK=block,
            DEPENDENT=can_depend(x.device),
            num_warps=num_warps or _num_warps(block),
            launch_pdl=can_depend(x.device),
        )
    return x, residual


def _check(x: Tensor, weight: Tensor) -> tuple[int, int]:
    rows, columns = x.shape
    assert columns <= MAX_COLUMNS, "a row is normalised by one program"
    assert columns == 1 or x.stride(1) == 1
    assert weight.shape == (columns,) and weight.is_contiguous()
    return rows, columns


def _num_warps(block: int) -> int:
    """Eight elements per thread, which for 16-bit values is one load of 16 bytes."""
    return min(max(block // 256, 1), 16)
