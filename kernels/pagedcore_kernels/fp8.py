"""Round rows to 8 bits, alone or at the end of a norm or an activation.

    T tokens   h columns: hidden size, or MLP width

    x, residual   [T, h]    h contiguous; T may have any stride; one dtype
    gate_up       [T, 2h]   the gate first; 2h contiguous, T may have any stride
    weight        [h]       contiguous
    values        [T, h]    float8 e4m3, contiguous
    scale         [T, 1]    float32

The grid is (T,): one program holds one row in registers, finds its largest magnitude, and writes
the row divided by scale = largest / 448. So rounding to 8 bits costs a norm no second pass: it
writes h bytes in place of 2 * h. Arithmetic is float32; what is rounded is not rounded to the
tensors' dtype before. A row with NaN or infinity becomes NaN where that is so, or everywhere.

`TorchOps.quantize`, `.add_rms_norm_quantized` and `.silu_mul_quantized` are the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore.execution.quantized import FLOAT8, LARGEST, Quantized

MAX_COLUMNS = 65536
"""A row has to fit the registers of one program."""

TINY = 2.0**-126


@triton.jit
def _store_row(value, values, scale, row, column, num_columns, LARGEST: tl.constexpr, TINY):
    """Write a row [BLOCK], which is zero beyond its columns, in 8 bits."""
    largest = tl.max(tl.abs(value))
    part = tl.maximum(largest / LARGEST, TINY)
    tl.store(scale + row, part)
    rounded = value * tl.div_rn(1.0, part)
    # NaN passes: it is neither below nor above
    rounded = tl.where(rounded > LARGEST, LARGEST, tl.where(rounded < -LARGEST, -LARGEST, rounded))
    target = values + row * num_columns + column
    tl.store(target, rounded.to(values.dtype.element_ty), column < num_columns)


@triton.jit
def _quantize_kernel(
    x, values, scale, x_stride, num_columns, TINY, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    _store_row(value, values, scale, row, column, num_columns, LARGEST, TINY)


@triton.jit
def _add_rms_norm_kernel(
    x,
    residual,
    weight,
    values,
    scale,
    x_stride,
    residual_stride,
    num_columns,
    eps,
    TINY,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    residual += row * residual_stride
    factor = tl.load(weight + column, inside, 0.0).to(tl.float32)
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    value += tl.load(residual + column, inside, 0.0).to(tl.float32)
    total = value.to(residual.dtype.element_ty)
    tl.store(residual + column, total, inside)
    value = total.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value) / num_columns + eps) * factor
    _store_row(normed, values, scale, row, column, num_columns, LARGEST, TINY)


@triton.jit
def _silu_mul_kernel(
    gate_up,
    values,
    scale,
    gate_up_stride,
    num_columns,
    TINY,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    gate_up += row * gate_up_stride + column
    gate = tl.load(gate_up, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + num_columns, inside, 0.0).to(tl.float32)
    mixed = gate * tl.sigmoid(gate) * up
    _store_row(mixed, values, scale, row, column, num_columns, LARGEST, TINY)


def quantize(x: Tensor) -> Quantized:
    """Round each row of x [T, h] to 8 bits."""
    rows, columns = x.shape
    _check(x, columns)
    out = _empty(x, columns)
    if rows:
        _quantize_kernel[(rows,)](
            x, out.values, out.scale, x.stride(0), columns, TINY, **_launch(columns)
        )
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Quantized, Tensor]:
    """Write x + residual over residual; return its scaled norm in 8 bits, and it."""
    rows, columns = x.shape
    _check(x, columns)
    assert residual.shape == x.shape and residual.dtype == x.dtype and residual.stride(1) == 1
    assert weight.shape == (columns,) and weight.is_contiguous()
    out = _empty(x, columns)
    if rows:
        _add_rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            out.values,
            out.scale,
            x.stride(0),
            residual.stride(0),
            columns,
            eps,
            TINY,
            **_launch(columns),
        )
    return out, residual


def silu_mul(gate_up: Tensor) -> Quantized:
    """silu(gate) * up, [T, h], of gate_up [T, 2h], in 8 bits."""
    rows, columns = len(gate_up), gate_up.shape[1] // 2
    _check(gate_up, columns)
    out = _empty(gate_up, columns)
    if rows:
        _silu_mul_kernel[(rows,)](
            gate_up, out.values, out.scale, gate_up.stride(0), columns, TINY, **_launch(columns)
        )
    return out


def _check(x: Tensor, columns: int) -> None:
    assert columns <= MAX_COLUMNS, "a row is rounded by one program"
    assert x.stride(1) == 1 or x.shape[1] == 1


def _empty(like: Tensor, columns: int) -> Quantized:
    values = torch.empty((len(like), columns), dtype=FLOAT8, device=like.device)
    scale = torch.empty((len(like), 1), dtype=torch.float32, device=like.device)
    return Quantized(values, scale, like.dtype)


def _launch(columns: int) -> dict[str, float]:
    block = triton.next_power_of_2(columns)
    return {"LARGEST": LARGEST, "BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}
