"""Add what several programs have summed of one tile, always in the same order."""

import triton
import triton.language as tl


@triton.jit
def join_parts(
    result,
    partial,
    arrivals,
    part,
    tile,
    num_tiles,
    in_tile,
    inside,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Leave one part of a tile, and take the sum of all PARTS if it is the last to arrive.

    partial [PARTS, num_tiles, SIZE] is scratch; arrivals [num_tiles] int32 are zero before and
    after. Returns whether this was the last, and the sum, which nobody else has. The loop is
    unrolled so that parts are asked for together: one after the other they take a microsecond each.
    """
    tl.store(partial + (part * num_tiles + tile) * SIZE + in_tile, result, inside)
    tl.debug_barrier()  # all warps have stored before one thread announces it
    is_last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == PARTS - 1
    if is_last:
        tl.store(arrivals + tile, 0)  # for the next product
        result = tl.zeros_like(result)
        for other in tl.static_range(PARTS):
            piece = partial + (other * num_tiles + tile) * SIZE + in_tile
            result += tl.load(piece, inside, 0, cache_modifier=".cg")
    return is_last, result
