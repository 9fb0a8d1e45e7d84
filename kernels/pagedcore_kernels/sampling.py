"""Draw one token from each row of logits, without a sort and without reading on the host.

    S rows   V vocabulary   C = cdiv(V, CHUNK) chunks of a row

    logits         [S, V]   any float type; V contiguous, S may have any stride
    parameters     [S]      temperature, min_p, top_p, uniform float32; top_k int32; contiguous
    peaks          [S, C]   int32: each chunk's largest logit, as a sortable key
    masses         [S, C]   float32: each chunk's sum of exp((logit - peak) / temperature)
    out            [S]      int64

`summarise`, on a grid of (C / 4, S), reads all logits once: S * V elements, which memory bandwidth
limits. `draw`, on a grid of (S,), finds the chunk in which the running mass passes the uniform, and
reads that chunk again to find the token; for a greedy row, the chunk that holds the largest logit.
Rows with a filter are left to `filtered_sampling`.

Sums have one order, whatever S is: a row's token does not depend on its batch mates (SAMPLE-10).
Masses are float32 inside a chunk and float64 across chunks.

A row whose largest logit is not finite (NaN counts as the largest of all) gives the token of that
logit, whatever its temperature: whoever looks at the drawn token's logit sees every bad row.

`pagedcore.execution.torch_sampling.sample` is the specification.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedcore.execution.ops import SamplingTensors
from pagedcore_kernels.filtered_sampling import draw_filtered
from pagedcore_kernels.sampling_keys import (
    CHUNK,
    LOG2_E,
    is_filtered,
    key_of,
    peak_keys,
    value_of,
)

_CHUNKS_PER_PROGRAM = 4


@triton.jit
def _summarise_kernel(
    logits,
    temperature,
    peaks,
    masses,
    logits_stride,
    num_tokens,
    num_chunks,
    LOG2_E: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WITH_MASS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    source = logits + row * logits_stride + token
    value = tl.load(source, token < num_tokens, -float("inf")).to(tl.float32)
    key = tl.max(key_of(value), 1)
    target = row * num_chunks + chunk
    tl.store(peaks + target, key, chunk < num_chunks)
    if WITH_MASS:
        heat = tl.load(temperature + row)
        scale = LOG2_E / tl.where(heat == 0, 1.0, heat)
        peak = value_of(key)
        usable = tl.abs(peak) < float("inf")  # else nothing has a weight
        value = tl.where(usable[:, None], value, -float("inf"))
        peak = tl.where(usable, peak, 0.0)
        mass = tl.sum(tl.exp2((value - peak[:, None]) * scale), 1)
        tl.store(masses + target, mass, chunk < num_chunks)


@triton.jit
def _draw_kernel(
    logits,
    temperature,
    min_p,
    top_k,
    top_p,
    uniform,
    peaks,
    masses,
    out,
    logits_stride,
    num_tokens,
    num_chunks,
    LOG2_E: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    ANY_FILTER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * logits_stride
    chunk = tl.arange(0, PADDED)
    key = peak_keys(peaks, row, chunk, num_chunks)
    top = tl.max(key)
    peak = value_of(top)
    column = tl.arange(0, CHUNK)
    heat = 0.0
    if not ALL_GREEDY:
        heat = tl.load(temperature + row)
    if (heat == 0) | (tl.abs(peak) == float("inf")) | (peak != peak):
        first = tl.min(tl.where(key == top, chunk, PADDED))
        token = first * CHUNK + column
        value = tl.load(source + token, token < num_tokens, -float("inf")).to(tl.float32)
        found = (key_of(value) == top) & (token < num_tokens)
        tl.store(out + row, tl.min(tl.where(found, token, num_tokens)).to(tl.int64))
    elif not ALL_GREEDY:
        filtered = False
        if ANY_FILTER:
            filtered = is_filtered(min_p, top_k, top_p, row, num_tokens)
        if not filtered:
            scale = LOG2_E / heat
            inside = chunk < num_chunks
            mass = tl.load(masses + row * num_chunks + chunk, inside, 0.0)
            weight = (mass * tl.exp2((value_of(key) - peak) * scale)).to(tl.float64)
            running = tl.cumsum(weight)
            target = tl.load(uniform + row).to(tl.float64) * tl.sum(weight)
            # rounding may leave the target beyond the last sum; a token without mass is never drawn
            last = tl.max(tl.where(weight > 0, chunk, 0))
            passed = (running > target) & (weight > 0)
            chosen = tl.minimum(tl.min(tl.where(passed, chunk, PADDED)), last)
            rest = target - tl.sum(tl.where(chunk == chosen, running - weight, 0.0))

            token = chosen * CHUNK + column
            value = tl.load(source + token, token < num_tokens, -float("inf")).to(tl.float32)
            weight = tl.exp2((value - peak) * scale).to(tl.float64)
            last = tl.max(tl.where(weight > 0, token, 0))
            passed = (tl.cumsum(weight) > rest) & (weight > 0)
            drawn = tl.minimum(tl.min(tl.where(passed, token, num_tokens)), last)
            tl.store(out + row, drawn.to(tl.int64))


def sample(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """Draw one token from each row of logits [S, V], in any float type: int64 [S].

    See `pagedcore.execution.ops.Ops.sample`.
    """
    num_rows, num_tokens = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return out
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_chunks = triton.cdiv(num_tokens, CHUNK)
    peaks = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=logits.device)
    masses = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=logits.device)
    greedy, any_filter = sampling.all_greedy, sampling.any_filter and not sampling.all_greedy
    _summarise_kernel[(triton.cdiv(num_chunks, _CHUNKS_PER_PROGRAM), num_rows)](
        logits,
        sampling.temperature,
        peaks,
        masses,
        logits.stride(0),
        num_tokens,
        num_chunks,
        LOG2_E=LOG2_E,
        CHUNK=CHUNK,
        CHUNKS=_CHUNKS_PER_PROGRAM,
        WITH_MASS=not greedy,
        num_warps=4,
    )
    _draw_kernel[(num_rows,)](
        logits,
        sampling.temperature,
        sampling.min_p,
        sampling.top_k,
        sampling.top_p,
        sampling.uniform,
        peaks,
        masses,
        out,
        logits.stride(0),
        num_tokens,
        num_chunks,
        LOG2_E=LOG2_E,
        CHUNK=CHUNK,
        PADDED=triton.next_power_of_2(num_chunks),
        ALL_GREEDY=greedy,
        ANY_FILTER=any_filter,
        num_warps=4,
    )
    if any_filter:
        draw_filtered(logits, sampling, peaks, masses, out)
    return out
