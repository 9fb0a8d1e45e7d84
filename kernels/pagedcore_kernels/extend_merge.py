"""Merge the pieces of attention that are left when the keys of few tokens are cut in parts.

    T tokens   H query heads   D elements per head   PARTS

    pieces   [PARTS, T, H, D] float32   weighted sums of values, at the scale 2 ** -peak
    stats    [PARTS, T, H, 2] float32   peak of the scores, base 2, and sum of the weights; the
                                        piece of a part without weight was not written
    sinks    [H] float32                one more score of each head, without a value; or none
    out      [T, H, D]                  contiguous

The grid is (T * H,): one program merges one head of one token, in order, so the result does not
depend on which part was ready first. It reads 4 * PARTS * T * H * (D + 2) bytes.

`TorchOps.attention` is the specification, of pieces and merge together.
"""

import triton
import triton.language as tl
from torch import Tensor

from pagedcore_kernels.decode_attention import sink_weight


@triton.jit(do_not_specialize=["first", "num_rows"])
def _merge_kernel(
    pieces,
    stats,
    sinks,
    out,
    first,
    num_rows,
    NUM_HEADS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Write one row of `out`, a head of a token, from its PARTS pieces."""
    row = first + tl.program_id(0)
    part = tl.arange(0, PARTS_PAD)
    column = tl.arange(0, D_PAD)
    place = part.to(tl.int64) * num_rows + row
    peak = tl.load(stats + place * 2, part < PARTS, -1e30)
    weight = tl.load(stats + place * 2 + 1, part < PARTS, 0.0)
    highest = tl.max(peak, 0)
    factor = tl.where(weight > 0, tl.exp2(peak - highest), 0.0)
    kept = (weight > 0)[:, None] & (column < D)[None, :]
    piece = tl.load(pieces + place[:, None] * D + column[None, :], kept, 0.0)
    total = tl.sum(piece * factor[:, None], 0)
    weight = tl.sum(weight * factor, 0)
    if HAS_SINKS:
        weight += sink_weight(sinks, highest, row % NUM_HEADS, True)
    tl.store(
        out + row.to(tl.int64) * D + column, total / tl.where(weight > 0, weight, 1.0), column < D
    )


def merge_parts(
    pieces: Tensor, stats: Tensor, out: Tensor, first_token: int, sinks: Tensor | None = None
) -> None:
    """Write out [T, H, D] from the token `first_token` on."""
    parts, num_tokens, num_heads, head_dim = pieces.shape
    assert pieces.is_contiguous() and stats.is_contiguous() and out.is_contiguous()
    num_rows = num_tokens * num_heads
    _merge_kernel[(num_rows - first_token * num_heads,)](
        pieces,
        stats,
        stats if sinks is None else sinks,
        out,
        first_token * num_heads,
        num_rows,
        NUM_HEADS=num_heads,
        HAS_SINKS=sinks is not None,
        D=head_dim,
        PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(parts),
        D_PAD=triton.next_power_of_2(head_dim),
        num_warps=1,
    )
