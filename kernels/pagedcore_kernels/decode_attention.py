"""Attention of one new token per sequence over its cached keys and values: the decode step.

    S sequences   H query heads   K kv heads   G = H / K heads that share keys   D head size
    N blocks      B positions per block        M table entries per row          P programs

    query                    [S, (H + 2K) * D]  the first H * D columns; S may have any stride
    key_cache, value_cache   [N, K, B, D]       contiguous; the query's dtype, float8_e4m3fn or int8
    key_scale, value_scale   [N, K, B] float32  contiguous; of int8 alone
    work                     WorkList           which tiles there are, and where; see `work_list`
    sinks                    [H] float32        a score of each head that has no value; or none
    out                      [S, H * D]         contiguous, same dtype as query

The keys of one head in one block lie together: a tile of TILE positions is one run of TILE * D
elements, which loads in full lines whatever the block size, and which a two-dimensional copy
descriptor over [N * K * B, D] can name by one row number.

The grid is (P, K), fixed for a device: each program takes an equal share of all tiles of one kv
head (see `work_list`) and walks through the sequences it covers. All G query heads of a kv head are
rows of one matrix product, padded to at least 16. The softmax is online, in float32, with base 2. A
sequence within one share is written at once. Of a split sequence each program leaves its piece in
`partial`, and the one that arrives last merges them all, always in order of position: the result
does not depend on who was last.

It reads 2 * K * D * itemsize bytes for each visible position, once: positions beyond the context
are masked in the load, so a last tile costs what it holds. Queries, outputs and pieces are small
beside that. At 4 * H * D operations a position the tensor cores are far from busy.

Of int8 it reads 2 * K * (D + 4) bytes, with 128 elements 52 % of what 16 bits take. A key's scale
multiplies its scores and a value's scale its probabilities: two products for a position and head,
none for an element, which costs its conversion alone. Expected is less than twice the speed: a warp
of four runs about 1,070 instructions for a tile of 64 positions, for float8 860, in 16 bits 550, so
an H200's multiprocessor issues for 1,070 cycles where memory delivers the tile within 820, and took
1,580 in 16 bits: 1.3 to 1.5 times as fast.

`TorchOps.attention` is the specification.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore_kernels.dependent import can_depend, wait_for_predecessors
from pagedcore_kernels.kept_types import multiplied_type
from pagedcore_kernels.work_list import WorkList

LOG2_E = 1.4426950408889634
MIN_ROWS = 16  # of a matrix product on tensor cores
TILE_BYTES = 16384  # of keys, and of values: many tiles in flight matter more than large ones


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the decode kernel is launched."""

    tile: int
    """Positions in a tile: a block, or a part of one."""

    num_warps: int

    num_stages: int
    """Tiles in flight or in use."""

    programs_per_sm: int
    """Programs that are resident together; more would wait for a second wave."""

    min_share: int = 4
    """Tiles that a program takes at least. Small: more parallel. Large: fewer merges."""


@cache
def choose_decode(
    head_dim: int, dtype: torch.dtype, block_size: int, shared_memory: int
) -> DecodeConfig:
    """What fits multiprocessors of `shared_memory` bytes: two programs with two tiles in flight."""
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    tile = min(block_size, 64, max(TILE_BYTES // row_bytes, 16))
    for num_stages in (3, 2):
        needed = (num_stages - 1) * (2 * tile + MIN_ROWS) * row_bytes + 10 * 1024
        if 2 * needed <= shared_memory:
            return DecodeConfig(tile, 4, num_stages, programs_per_sm=2)
    return DecodeConfig(tile, 4, 2, programs_per_sm=1)


@triton.jit
def sink_weight(sinks, peak, head, exists):
    """What a score without a value adds to the sum of weights at the scale 2 ** -peak."""
    score = tl.load(sinks + head, exists, -1e30) * 1.4426950408889634
    return tl.exp2(tl.minimum(score - peak, 126.0))  # finite where nothing else is seen


@triton.jit
def merge_pieces(
    pieces,
    stats,
    sinks,
    out,
    first,
    last,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Write the attention of one sequence and kv head, from its pieces in programs first..last."""
    group = tl.arange(0, G_PAD)
    column = tl.arange(0, D_PAD)
    inside = (group < G)[:, None] & (column < D)[None, :]
    peak = tl.full([G_PAD], -1e30, tl.float32)
    weight = tl.zeros([G_PAD], tl.float32)
    total = tl.zeros([G_PAD, D_PAD], tl.float32)
    for program in range(first, last + 1):
        begins = (program == first).to(tl.int32)
        row = ((program * 2 + begins) * NUM_KV_HEADS + kv_head) * G + group
        piece_peak = tl.load(stats + row * 2, group < G, -1e30, cache_modifier=".cg")
        piece_weight = tl.load(stats + row * 2 + 1, group < G, 0.0, cache_modifier=".cg")
        piece = tl.load(
            pieces + row[:, None] * D + column[None, :], inside, 0.0, cache_modifier=".cg"
        )
        new_peak = tl.maximum(peak, piece_peak)
        old_factor = tl.exp2(peak - new_peak)
        new_factor = tl.exp2(piece_peak - new_peak)
        total = total * old_factor[:, None] + piece * new_factor[:, None]
        weight = weight * old_factor + piece_weight * new_factor
        peak = new_peak
    if HAS_SINKS:
        weight += sink_weight(sinks + kv_head * G, peak, group, group < G)
    weight = tl.where(group < G, weight, 1.0)
    tl.store(out + group[:, None] * D + column[None, :], total / weight[:, None], inside)


@triton.jit
def announce_piece(
    sequence,
    pieces,
    stats,
    sinks,
    out,
    tile_start,
    arrivals,
    share,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Count this program's piece of a split sequence; the last to arrive merges all of them."""
    first = tl.load(tile_start + sequence) // share
    last = (tl.load(tile_start + sequence + 1) - 1) // share
    counter = arrivals + sequence * NUM_KV_HEADS + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") == last - first:
        tl.store(counter, 0)  # for the next layer
        target = out + (sequence.to(tl.int64) * NUM_KV_HEADS + kv_head) * G * D
        merge_pieces(pieces, stats, sinks, target, first, last, kv_head,
                     NUM_KV_HEADS, G, D, G_PAD, D_PAD, HAS_SINKS)  # fmt: skip


@triton.jit
def _decode_kernel(
    query,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    sinks,
    out,
    pieces,
    stats,
    header,
    tile_start,
    tiles,
    arrivals,
    query_stride,
    scale,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    TILE: tl.constexpr,
    G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    COMPUTE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    wait_for_predecessors(DEPENDENT)
    share = tl.load(header + 1)
    begin = program * share
    end = tl.minimum(begin + share, tl.load(header))
    if begin >= end:
        return
    group = tl.arange(0, G_PAD)
    column = tl.arange(0, D_PAD)
    position = tl.arange(0, TILE)
    inside = (group < G)[:, None] & (column < D)[None, :]
    in_head = (kv_head * G + group)[:, None] * D + column[None, :]
    in_tile = position[:, None] * D + column[None, :]

    place = tl.load(tiles + begin * 2)
    span = tl.load(tiles + begin * 2 + 1)
    first = span >> 16
    last = tl.load(tiles + end * 2 - 1) >> 16
    is_open = tl.load(tile_start + first) < begin  # the first piece goes on from another share
    is_cut = tl.load(tile_start + last + 1) > end  # the last piece goes on in another share
    peak = tl.full([G_PAD], -1e30, tl.float32)
    weight = tl.zeros([G_PAD], tl.float32)
    total = tl.zeros([G_PAD, D_PAD], tl.float32)
    for tile in range(begin, end):
        sequence = span >> 16
        begins = (span >> 15) & 1 != 0
        ends = ((span >> 14) & 1 != 0) | (tile + 1 == end)
        block = place // (B // TILE)
        part = place % (B // TILE)
        start = ((block.to(tl.int64) * NUM_KV_HEADS + kv_head) * (B // TILE) + part) * TILE
        visible = position < (span & 127)
        if HAS_WINDOW:
            visible &= position >= ((span >> 7) & 127)
        loaded = visible[:, None] & (column < D)[None, :]
        source = query + sequence.to(tl.int64) * query_stride
        queries = tl.load(source + in_head, inside, 0.0)
        keys = tl.load(key_cache + start * D + in_tile, loaded, 0.0)
        values = tl.load(value_cache + start * D + in_tile, loaded, 0.0)
        if HAS_SCALES:
            scale_of_keys = tl.load(key_scale + start + position, visible, 0.0)
            scale_of_values = tl.load(value_scale + start + position, visible, 0.0)
        place = tl.load(tiles + tile * 2 + 2, tile + 1 < end, 0)  # of the next tile
        span = tl.load(tiles + tile * 2 + 3, tile + 1 < end, 0)

        queries, keys, values = queries.to(COMPUTE), keys.to(COMPUTE), values.to(COMPUTE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if HAS_SCALES:
            scores *= scale_of_keys[None, :]
        if HAS_SOFT_CAP:  # scale holds 2 / cap: tanh(x) = 2 * sigmoid(2x) - 1
            scores = (2 * tl.sigmoid(scores) - 1) * soft_cap
        scores = tl.where(visible[None, :], scores, -1e30)
        peak = tl.where(begins, -1e30, peak)
        weight = tl.where(begins, 0.0, weight)
        total = tl.where(begins, 0.0, total)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        factor = tl.exp2(peak - new_peak)
        probs = tl.exp2(scores - new_peak[:, None])
        weight = weight * factor + tl.sum(probs, 1)
        total = total * factor[:, None]
        if HAS_SCALES:
            probs *= scale_of_values[None, :]
        total = tl.dot(probs.to(values.dtype), values, total, input_precision=PRECISION)
        peak = new_peak

        if ends:
            continues = is_open & (sequence == first)
            if continues | (is_cut & (sequence == last)):
                slot = program * 2 + (continues == 0).to(tl.int32)
                piece = (slot * NUM_KV_HEADS + kv_head) * G + group
                tl.store(stats + piece * 2, peak, group < G)
                tl.store(stats + piece * 2 + 1, weight, group < G)
                tl.store(pieces + piece[:, None] * D + column[None, :], total, inside)
            else:
                if HAS_SINKS:
                    weight += sink_weight(sinks + kv_head * G, peak, group, group < G)
                target = out + sequence.to(tl.int64) * (NUM_KV_HEADS * G * D)
                tl.store(target + in_head, total / weight[:, None], inside)

    tl.debug_barrier()  # all warps have stored their part before one thread announces it
    if is_open | (is_cut & (first == last)):
        announce_piece(first, pieces, stats, sinks, out, tile_start, arrivals, share, kv_head,
                       NUM_KV_HEADS, G, D, G_PAD, D_PAD, HAS_SINKS)  # fmt: skip
    if is_cut & (first != last):
        announce_piece(last, pieces, stats, sinks, out, tile_start, arrivals, share, kv_head,
                       NUM_KV_HEADS, G, D, G_PAD, D_PAD, HAS_SINKS)  # fmt: skip


def decode_attention(
    query: Tensor,
    num_heads: int,
    scale: float,
    key_cache: Tensor,
    value_cache: Tensor,
    work: WorkList,
    out: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    config: DecodeConfig,
) -> None:
    """Write the attention of S single tokens into out [S, H * D]; `work` is of the same step.

    `scales` are those of keys and of values.
    """
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    group = num_heads // num_kv_heads
    assert group * num_kv_heads == num_heads
    assert query.stride(1) == 1 and out.is_contiguous()
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    assert scales is None or all(scale.is_contiguous() for scale in scales)
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
    pieces = torch.empty(
        work.programs * 2 * num_heads * (head_dim + 2), dtype=torch.float32, device=query.device
    )
    _decode_kernel[(work.programs, num_kv_heads)](
        query,
        key_cache,
        value_cache,
        *((pieces, pieces) if scales is None else scales),
        pieces if sinks is None else sinks,
        out,
        pieces,
        pieces[work.programs * 2 * num_heads * head_dim :],
        work.header,
        work.tile_start,
        work.tiles,
        work.arrivals,
        query.stride(0),
        scale * LOG2_E if soft_cap is None else 2 * scale / soft_cap,
        0.0 if soft_cap is None else soft_cap * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        G=group,
        D=head_dim,
        B=block_size,
        HAS_WINDOW=window is not None,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks is not None,
        TILE=config.tile,
        G_PAD=max(MIN_ROWS, triton.next_power_of_2(group)),
        D_PAD=triton.next_power_of_2(head_dim),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        HAS_SCALES=scales is not None,
        COMPUTE=multiplied_type(query.dtype, key_cache.dtype),
        num_warps=config.num_warps,
        DEPENDENT=can_depend(query.device),
        num_stages=config.num_stages,
        launch_pdl=can_depend(query.device),
    )
