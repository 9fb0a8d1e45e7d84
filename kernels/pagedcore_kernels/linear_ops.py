"""The products of TritonOps: which are the vendor's and which are our own.

    M rows   N outputs   K inputs   G groups of K that share a scale

For few rows, weights are all the traffic: `small_linear` reads them once, in 16 or 8 bits, and
leaves the rows as they are. For many rows, arithmetic counts: 16 bits go to the vendor's library, 8
bits to its scaled product, for which rows are rounded too. `small_linear_plans` says from the shape
alone which of the two it is, so that a captured step holds the choice.
"""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.execution.ops import Ops
from pagedcore.execution.quantized import GROUP_COLUMNS, Activations, Grouped, Quantized
from pagedcore_kernels import block_fp8, fp8, int8, packed_linear, packed_strips, small_linear
from pagedcore_kernels.dependent import can_depend
from pagedcore_kernels.fallback import with_fallback
from pagedcore_kernels.packed_layout import Packed, pack
from pagedcore_kernels.packed_widen import multiply_widened
from pagedcore_kernels.small_linear_plans import choose_scaled_plan
from pagedcore_kernels.tuned_plans import TunedPlans

FAST_ACCUMULATION = True
"""Sums of 8-bit products are kept in fewer than 32 bits inside the tensor cores. The error, about
1e-3 of a sum over 14,336, is far below that of rounding to 8 bits; the gain is up to a tenth."""

SCALED_CAPABILITY = (8, 9)
"""The first whose tensor cores multiply float8."""

LIBRARY_ROWS = 4
"""The library's product with scales of groups takes multiples of so many rows, for their scales to
lie at whole 16 bytes. From there on it is faster than `block_fp8`."""

_ALIGNMENT = 16  # of the inputs and outputs of a scaled product


class LinearOps:
    """`linear` and `QuantizedOps`, for one device, for products that run one after the other."""

    device: torch.device
    replaced: set[str]
    plain: Ops
    supports_graphs: bool
    _scratch: small_linear.Scratch
    _plans: TunedPlans
    _shared_memory: int

    def pack_linear(self, weight: Tensor) -> Tensor:
        """See `Ops.pack_linear`."""
        return weight

    @with_fallback
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        if small_linear.is_faster(len(x), *weight.shape) and x.stride(1) == 1:
            return small_linear.linear(
                x, weight, bias, self._scratch, dependent=can_depend(x.device)
            )
        return functional.linear(x, weight, bias)

    def pack_head(self, weight: Tensor, stored: Grouped | None) -> Tensor | Grouped:
        """See `Ops.pack_head`."""
        return weight

    @with_fallback
    def scores(self, hidden: Tensor, weight: Tensor, packed: Tensor | Grouped) -> Tensor:
        """See `Ops.scores`."""
        assert isinstance(packed, Tensor)
        if hidden.dtype == torch.float32 or hidden.device.type != "cuda":
            return self.linear(hidden, packed).float()
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @with_fallback
    def quantize(self, x: Tensor) -> Quantized:
        """See `QuantizedOps.quantize`."""
        return fp8.quantize(x)

    def wants_quantized(
        self, num_tokens: int, weight: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> bool:
        """See `QuantizedOps.wants_quantized`."""
        n, k = weight.shape
        return (
            self._multiplies_float8
            and dtype == torch.bfloat16  # what scaled products come out in
            and scale.shape[1] == 1
            and n % _ALIGNMENT == 0
            and k % _ALIGNMENT == 0
            and choose_scaled_plan(num_tokens, n, k) is None
        )

    @with_fallback
    def scaled_linear(
        self, x: Activations, weight: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """See `QuantizedOps.scaled_linear`."""
        if isinstance(x, Tensor):
            if not self.wants_quantized(len(x), weight, scale, x.dtype):
                x = x if x.stride(1) == 1 else x.contiguous()
                if len(x) > 1 and x.dtype != torch.float32 and self._multiplies_float8:
                    return self._multiply_groups(x, weight, scale, bias)
                return small_linear.linear(
                    x, weight, bias, self._scratch, scale=scale, dependent=can_depend(x.device)
                )
            x = self.quantize(x)
        return torch._scaled_mm(
            x.values,
            weight.t(),
            x.scale,
            scale.t(),
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=FAST_ACCUMULATION,
        )

    def _multiply_groups(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        """`scaled_linear` of rows that are rounded in groups, with a weight of any groups."""
        (rows, k), (n, num_groups) = x.shape, scale.shape
        dependent = can_depend(x.device)
        is_aligned = n % _ALIGNMENT == 0 and k % GROUP_COLUMNS == 0
        is_known = x.dtype == torch.bfloat16 and num_groups > 1 and self._scales_groups
        if rows >= LIBRARY_ROWS and is_aligned and is_known:
            values, of_rows = block_fp8.quantize_groups(
                x, multiple=LIBRARY_ROWS, dependent=dependent
            )
            out = torch._scaled_mm(
                values,
                weight.t(),
                of_rows.t(),
                scale.t().contiguous(),
                out_dtype=x.dtype,
            )[:rows]
            return out if bias is None else out.add_(bias)
        values, of_rows = block_fp8.quantize_groups(x, dependent=dependent)
        if num_groups == 1:
            scale = scale.expand(n, len(of_rows))
        return block_fp8.block_linear(
            values, of_rows, weight, scale, bias, x.dtype, self._scratch, dependent=dependent
        )

    @with_fallback
    def add_rms_norm_quantized(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Quantized, Tensor]:
        """See `QuantizedOps.add_rms_norm_quantized`."""
        return fp8.add_rms_norm(x, residual, weight, eps)

    @with_fallback
    def silu_mul_quantized(self, gate_up: Tensor) -> Quantized:
        """See `QuantizedOps.silu_mul_quantized`."""
        return fp8.silu_mul(gate_up)

    def pack_grouped(self, weight: Grouped, dtype: torch.dtype) -> Grouped:
        """See `QuantizedOps.pack_grouped`."""
        return pack(weight) or weight

    @with_fallback
    def grouped_linear(self, x: Tensor, weight: Grouped, bias: Tensor | None = None) -> Tensor:
        """See `QuantizedOps.grouped_linear`."""
        if not isinstance(weight, Packed):
            return self.plain.grouped_linear(x, weight, bias)
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        elif x.stride(1) != 1:
            x = x.contiguous()
        if self._streams and (strips := packed_strips.choose(len(x), weight, x.dtype)) is not None:
            dependent = can_depend(x.device)
            return packed_strips.linear(x, weight, bias, self._scratch, strips, dependent=dependent)
        plan = self._plans.choose(len(x), weight)
        if plan is None:
            return multiply_widened(x, weight, bias)
        return packed_linear.linear(
            x,
            weight,
            bias,
            self._scratch,
            plan=plan,
            dependent=can_depend(x.device),
            shared_memory=self._shared_memory,
        )

    def pack_int8(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """See `QuantizedOps.pack_int8`."""
        return weight

    @with_fallback
    def int8_linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """See `QuantizedOps.int8_linear`."""
        x = x if x.stride(1) == 1 else x.contiguous()
        return int8.linear(x, weight, scale, bias, self._scratch, dependent=can_depend(x.device))

    @cached_property
    def _streams(self) -> bool:
        """Whether `packed_strips` runs on this device."""
        return packed_strips.can_run(self.device)

    @cached_property
    def _scales_groups(self) -> bool:
        """Whether the library's scaled product takes scales of groups: on Hopper, CUDA 12.9."""
        release = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
        return can_depend(self.device) and release >= (12, 9) and _is_hopper(self.device)

    @cached_property
    def _multiplies_float8(self) -> bool:
        if self.device.type != "cuda":
            return False
        return torch.cuda.get_device_capability(self.device) >= SCALED_CAPABILITY


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9
