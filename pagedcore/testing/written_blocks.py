"""Writes matrices in the blocks of GGUF files and of MXFP4, by rounding to the nearest.

    B blocks   R runs in a block, each of which shares a scale

As in `written_formats.py`, each writer follows its format's definition, with float32 numbers, and
knows nothing of what reads it. The layouts are told in `pagedcore.sources.gguf_quants`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Blocks = tuple[Tensor, Tensor]
"""Bytes [B, bytes of a block] uint8, and the numbers [B, numbers of a block] they stand for."""

_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Of MXFP4, by the three bits behind its sign."""


def gguf_matrix(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] float32 as rows of bytes [out, n] uint8, and what they stand for.

    `kind` is one of GGUF_KINDS, whose block must divide the inputs.
    """
    size, write = GGUF_KINDS[kind]
    stored, meant = write(weight.float().reshape(-1, size))
    return stored.view(len(weight), -1), meant.view(weight.shape)


def mxfp4_matrices(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Matrices [E, out, in] by what follows their name, and what they stand for, float32."""
    runs = weight.float().unflatten(-1, (-1, 32))
    exponent = runs.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
    shrunk = runs / torch.exp2(exponent)[..., None]
    codes = (shrunk.abs()[..., None] - _MAGNITUDES).abs().argmin(-1)
    signs = torch.where(shrunk < 0, -1.0, 1.0)
    meant = signs * _MAGNITUDES[codes] * torch.exp2(exponent)[..., None]
    codes = (codes + 8 * (shrunk < 0)).to(torch.uint8)
    tensors = {
        "_blocks": codes[..., ::2] | codes[..., 1::2] << 4,
        "_scales": (exponent + 127).to(torch.uint8),
    }
    return tensors, meant.flatten(-2)


def _bytes_of(numbers: Tensor) -> Tensor:
    """Numbers [B, 1] as float16, by their bytes [B, 2]."""
    return numbers.half().contiguous().view(torch.uint8)


def _in_half(numbers: Tensor) -> Tensor:
    """Numbers as float16 has them, none of them zero."""
    return torch.where(numbers == 0, 1e-4, numbers).half().float()


def _signed(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales [B, 1] of which the number furthest from zero is the least code; codes [B, n]."""
    half = 2 ** (bits - 1)
    furthest = x.gather(1, x.abs().argmax(1, keepdim=True))
    scale = _in_half(furthest / -half)
    return scale, ((x / scale).round() + half).clamp(0, 2 * half - 1).to(torch.uint8)


def _ranged(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and minima [B, 1], between which the codes [B, n] lie."""
    low, largest = x.amin(1, keepdim=True).half().float(), 2**bits - 1
    scale = _in_half((x.amax(1, keepdim=True) - low) / largest)
    return scale, low, ((x - low) / scale).round().clamp(0, largest).to(torch.uint8)


def _halves(codes: Tensor) -> Tensor:
    """Codes [..., 2n] in bytes [..., n]: the first n in the low halves."""
    low, high = codes.chunk(2, -1)
    return low & 15 | (high & 15) << 4


def _fifth_bits(codes: Tensor) -> Tensor:
    """The fifth bit of codes [B, 32], eight in a byte: [B, 4]."""
    bits = (codes >> 4 & 1).view(-1, 4, 8).int() << torch.arange(8)
    return bits.sum(-1).to(torch.uint8)


def _q4_0(x: Tensor) -> Blocks:
    scale, codes = _signed(x, 4)
    return torch.cat([_bytes_of(scale), _halves(codes)], 1), (codes.float() - 8) * scale


def _q4_1(x: Tensor) -> Blocks:
    scale, low, codes = _ranged(x, 4)
    stored = [_bytes_of(scale), _bytes_of(low), _halves(codes)]
    return torch.cat(stored, 1), codes * scale + low


def _q5_0(x: Tensor) -> Blocks:
    scale, codes = _signed(x, 5)
    stored = [_bytes_of(scale), _fifth_bits(codes), _halves(codes)]
    return torch.cat(stored, 1), (codes.float() - 16) * scale


def _q5_1(x: Tensor) -> Blocks:
    scale, low, codes = _ranged(x, 5)
    stored = [_bytes_of(scale), _bytes_of(low), _fifth_bits(codes), _halves(codes)]
    return torch.cat(stored, 1), codes * scale + low


def _q8_0(x: Tensor) -> Blocks:
    scale = _in_half(x.abs().amax(1, keepdim=True) / 127)
    codes = (x / scale).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([_bytes_of(scale), codes.view(torch.uint8)], 1), codes * scale


def _nested(of_runs: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [B, R], none below zero, as codes of 6 bits and a scale [B, 1] in float16."""
    scale = _in_half(of_runs.amax(1, keepdim=True) / 63)
    return scale, (of_runs / scale).round().clamp(0, 63).to(torch.uint8)


def _k(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """What Q4_K and Q5_K begin with [B, 16], codes [B, 8, 32], and what they stand for."""
    runs, largest = x.view(-1, 8, 32), 2**bits - 1
    low = runs.amin(2).clamp(max=0)
    scale, steps = _nested((runs.amax(2) - low) / largest)
    low_scale, lows = _nested(-low)
    step, least = (scale * steps)[..., None], (low_scale * lows)[..., None]
    codes = ((runs + least) / step.clamp(min=1e-9)).round().clamp(0, largest).to(torch.uint8)
    packed = [
        steps[:, :4] | steps[:, 4:] >> 4 << 6,
        lows[:, :4] | lows[:, 4:] >> 4 << 6,
        steps[:, 4:] & 15 | (lows[:, 4:] & 15) << 4,
    ]
    head = torch.cat([_bytes_of(scale), _bytes_of(low_scale), *packed], 1)
    return head, codes, (codes * step - least).flatten(1)


def _q4_k(x: Tensor) -> Blocks:
    head, codes, meant = _k(x, 4)
    return torch.cat([head, _halves(codes.view(-1, 4, 64)).flatten(1)], 1), meant


def _q5_k(x: Tensor) -> Blocks:
    head, codes, meant = _k(x, 5)
    shifts = torch.arange(8)[:, None]
    fifth = ((codes >> 4 & 1).int() << shifts).sum(1).to(torch.uint8)
    return torch.cat([head, fifth, _halves(codes.view(-1, 4, 64)).flatten(1)], 1), meant


def _q6_k(x: Tensor) -> Blocks:
    runs = x.view(-1, 16, 16)
    furthest = runs.gather(2, runs.abs().argmax(2, keepdim=True))[..., 0] / -32
    scale = _in_half(furthest.abs().amax(1, keepdim=True) / 127)
    steps = (furthest / scale).round().clamp(-127, 127)
    step = (scale * steps)[..., None]
    codes = (runs / torch.where(step == 0, 1e-9, step)).round().clamp(-32, 31)
    meant = (codes * step).flatten(1)
    stored = (codes + 32).to(torch.uint8).view(-1, 2, 4, 32)
    low = _halves(stored.view(-1, 2, 128)).flatten(1)
    shifts = 2 * torch.arange(4)[:, None]
    high = ((stored >> 4).int() << shifts).sum(2).to(torch.uint8).flatten(1)
    parts = [low, high, steps.to(torch.int8).view(torch.uint8), _bytes_of(scale)]
    return torch.cat(parts, 1), meant


GGUF_KINDS: dict[str, tuple[int, Callable[[Tensor], Blocks]]] = {
    "Q4_0": (32, _q4_0),
    "Q4_1": (32, _q4_1),
    "Q5_0": (32, _q5_0),
    "Q5_1": (32, _q5_1),
    "Q8_0": (32, _q8_0),
    "Q4_K": (256, _q4_k),
    "Q5_K": (256, _q5_k),
    "Q6_K": (256, _q6_k),
}
"""Numbers in a block, and what writes blocks of them."""
