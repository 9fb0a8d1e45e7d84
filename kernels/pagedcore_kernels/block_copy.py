"""Copy the first slots of blocks to other blocks, within one layer's cache: copy on write.

    C copies   N blocks   K kv heads   B positions per block   D elements per head

    copies                    [C, 3] int32    source, destination, number of slots; contiguous
    key_cache, value_cache    [N, K, B, D]    contiguous; written in place

The grid is (C, K): one program moves the keys and values of one head, which lie in one run of n * D
elements. It moves 4 * K * n * D elements for a copy of n slots. No destination may be the source
or the destination of another copy: programs run in any order.

`TorchOps.copy_blocks` is the specification.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy_kernel(
    copies, key_cache, value_cache, RUN: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    copy = copies + tl.program_id(0) * 3
    head = tl.program_id(1)
    source = (tl.load(copy).to(tl.int64) * tl.num_programs(1) + head) * RUN
    target = (tl.load(copy + 1).to(tl.int64) * tl.num_programs(1) + head) * RUN
    count = tl.load(copy + 2) * D
    for base in range(0, count, BLOCK):
        element = base + tl.arange(0, BLOCK)
        keys = tl.load(key_cache + source + element, element < count)
        values = tl.load(value_cache + source + element, element < count)
        tl.store(key_cache + target + element, keys, element < count)
        tl.store(value_cache + target + element, values, element < count)


def copy_blocks(key_cache: Tensor, value_cache: Tensor, copies: Tensor) -> None:
    """Copy as copies [C, 3] says, in the caches [N, K, B, D]."""
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    assert key_cache.is_contiguous() and value_cache.is_contiguous() and copies.is_contiguous()
    if copies.shape[0]:
        _copy_kernel[(copies.shape[0], num_kv_heads)](
            copies,
            key_cache,
            value_cache,
            RUN=block_size * head_dim,
            D=head_dim,
            BLOCK=2048,
            num_warps=4,
        )
