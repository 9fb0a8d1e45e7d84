"""Scores of all tokens that keep the order of the best, though they are computed in 16 bits.

    S sequences   V vocabulary   h hidden size

bfloat16 has 8 bits: scores from 16 to 32 are multiples of 1/8, so close calls end in ties, which
the lowest id wins. A product in float32 would double what the head reads, and the head is a quarter
of a small model. So the few best of each row are computed again, by themselves, in float32.
"""

import torch
from torch import Tensor

NUM_REFINED = 8
"""Tokens of each row that are computed again."""

_BLOCK = 128
"""Tokens that are looked at together first: the best are in the blocks with the largest maxima."""


def refine(scores: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Scores [S, V] in 16 bits, of hidden [S, h] times weight [V, h]: float32, the best exact.

    Nothing is read on the host.
    """
    exact = scores.float()
    best = _best(exact)
    rows = torch.nn.functional.embedding(best, weight).float()  # [S, k, h]
    exact.scatter_(1, best, torch.bmm(rows, hidden.float()[:, :, None])[:, :, 0])
    return exact


def _best(scores: Tensor) -> Tensor:
    """Ids [S, k] of the largest scores of each row [S, V], in no order."""
    num_seqs, vocab_size = scores.shape
    whole = vocab_size // _BLOCK * _BLOCK
    if whole != vocab_size or vocab_size < 2 * _BLOCK * NUM_REFINED:
        k = min(NUM_REFINED, vocab_size)
        return scores.topk(k, dim=-1, sorted=False).indices
    blocks = scores.view(num_seqs, -1, _BLOCK)
    block = blocks.amax(-1).topk(NUM_REFINED, dim=-1, sorted=False).indices
    candidates = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    found = candidates.topk(NUM_REFINED, dim=-1, sorted=False).indices
    return block.gather(1, found // _BLOCK) * _BLOCK + found % _BLOCK
