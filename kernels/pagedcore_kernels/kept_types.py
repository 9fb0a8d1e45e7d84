"""What attention kernels need to know of how keys and values are kept."""

import torch
import triton.language as tl
from torch import Tensor

from pagedcore.execution.ops import LayerCache

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def multiplied_type(query: torch.dtype, kept: torch.dtype) -> tl.dtype:
    """The type in which queries and keys are multiplied: one that holds what is kept exactly.

    float8 is exact in float16 but its range is not bfloat16's to convert to; whole numbers of 8
    bits are exact in all three.
    """
    if kept == torch.float8_e4m3fn and query == torch.bfloat16:
        return tl.float16
    return _TYPES[query]


def scales_of(cache: LayerCache) -> tuple[Tensor, Tensor] | None:
    """Scales of keys and of values [N, K, B], where the cache's format has them."""
    if cache.key_scale is None or cache.value_scale is None:
        return None
    return cache.key_scale, cache.value_scale
