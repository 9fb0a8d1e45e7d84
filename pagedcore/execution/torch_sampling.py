"""Draw tokens from logits in plain torch: the CPU path, and the specification of `Ops.sample`.

    S rows of logits   V vocabulary   W tokens per row that may be left after the filters

A *score* is a logit divided by the temperature; a token that a filter removed has score -inf. On
the CPU, W is read from the data, so that the whole vocabulary is never sorted. On other devices
W = V: nothing is read on the host, and steps can be captured.
"""

import torch
from torch import Tensor

from pagedcore.execution.ops import SamplingTensors

SLACK = 2.0**-20
"""Relative tolerance of min_p and top_p. Probabilities are float32: on paper, 0.5 of 0.5, 0.3, 0.2
is reached by the first alone, and rounding must not change that."""

_BLOCK = 128
"""Tokens that are looked at together first. It divides the usual sizes of vocabularies."""


def sample(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """Draw one token from each row of logits [S, V], in any float type: int64 [S].

    See `pagedcore.execution.ops.Ops.sample`.
    """
    if sampling.all_greedy:
        return _argmax(logits)
    scores, tokens = _filter(_scale(logits, sampling), sampling)
    drawn = _search(scores, sampling.uniform)
    if tokens is not None:
        drawn = tokens.gather(1, drawn[:, None])[:, 0]
    largest = _argmax(logits)
    is_bad = ~logits.gather(1, largest[:, None])[:, 0].isfinite()
    return torch.where((sampling.temperature == 0) | is_bad, largest, drawn)


def filter_scores(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """Scores [S, V] float32 after temperature, min_p, top-k and top-p, in this order.

    Each filter works on what the one before left (semantics SAMPLE-7); the most likely token always
    stays. top-k keeps ties of the k-th token; of equal tokens at the border, top-p keeps those with
    the lowest ids. Rows with temperature 0 are not scaled.
    """
    scores, tokens = _filter(_scale(logits, sampling), sampling)
    if tokens is None:
        return scores
    return scores.new_full(logits.shape, -torch.inf).scatter_(1, tokens, scores)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) for each pair of seed and position, both int64 [S]: float32 [S].

    Depends on nothing else, so a seeded request draws the same tokens whatever its batch, its row,
    its chunks or its preemptions (SAMPLE-10). It is the output number `position + 1` of splitmix64
    started at `seed` (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    2014; constants as in Vigna's splitmix64.c), its upper 24 bits as a fraction. In unsigned 64-bit
    arithmetic: z = seed + (position + 1) * 0x9E3779B97F4A7C15; z = (z ^ z >> 30) *
    0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB; z = z ^ z >> 31; result =
    (z >> 40) * 2**-24.
    """
    z = torch.add(seed + _GAMMA, position, alpha=_GAMMA)
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return _shift_right(z ^ _shift_right(z, 31), 40).float() * 2.0**-24


_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # torch has no arithmetic on uint64: int64 wraps alike
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift without the sign: torch's own shift of int64 repeats it."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _scale(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """Scores [S, V] float32 before any filter."""
    temperature = sampling.temperature
    return logits / torch.where(temperature == 0, 1.0, temperature)[:, None]


def _filter(scores: Tensor, sampling: SamplingTensors) -> tuple[Tensor, Tensor | None]:
    """Apply the filters: scores [S, W], and their tokens [S, W] in rising order; None if W = V."""
    if not sampling.any_filter:
        return scores, None
    tokens: Tensor | None = None
    if _is_used((sampling.min_p > 0) | (sampling.top_k > 0)):
        least = torch.maximum(
            _min_p_bound(scores, sampling.min_p), _top_k_bound(scores, sampling.top_k)
        )
        scores, tokens = _narrow(scores, tokens, least)
        scores = scores.masked_fill(scores < least[:, None], -torch.inf)
    limited = sampling.top_p < 1
    if _is_used(limited):
        mass = _mass(scores)
        scores, tokens = _narrow(scores, tokens, _top_p_bound(scores, sampling.top_p))
        kept = _top_p_mask(scores, mass, sampling.top_p) | ~limited[:, None]
        scores = scores.masked_fill(~kept, -torch.inf)
    return scores, tokens


def _is_used(rows: Tensor) -> bool:
    """Whether a filter has work; taken for granted where looking would make the host wait."""
    return not rows.is_cpu or bool(rows.any())


def _narrow(scores: Tensor, tokens: Tensor | None, least: Tensor) -> tuple[Tensor, Tensor | None]:
    """Leave out tokens below `least` [S], as far as all rows can; only where sizes may be read."""
    if not scores.is_cpu:
        return scores, tokens
    width = max(1, int((scores >= least[:, None]).sum(-1, dtype=torch.int32).max()))
    if width > scores.shape[-1] // 2:
        return scores, tokens
    columns = scores.topk(width, dim=-1, sorted=False).indices.sort(-1).values
    return scores.gather(1, columns), columns if tokens is None else tokens.gather(1, columns)


def _min_p_bound(scores: Tensor, min_p: Tensor) -> Tensor:
    """Least score [S] that min_p keeps."""
    return scores.amax(-1) + (min_p * (1 - SLACK)).log()


def _top_k_bound(scores: Tensor, top_k: Tensor) -> Tensor:
    """Least score [S] that top-k keeps: that of the k-th token.

    What min_p left are the most likely tokens, so the k-th of them, where there is one, is the k-th
    of all.
    """
    vocab_size = scores.shape[-1]
    limited = (top_k > 0) & (top_k < vocab_size)
    if not _is_used(limited):
        return scores.new_full(top_k.shape, -torch.inf)
    rank = torch.where(limited, top_k, 1).long()
    largest = scores.topk(int(rank.max()) if rank.is_cpu else vocab_size, dim=-1).values
    kth = largest.gather(1, rank[:, None] - 1)[:, 0]
    return torch.where(limited, kth, -torch.inf)


def _top_p_bound(scores: Tensor, top_p: Tensor) -> Tensor:
    """A score [S] below which top-p needs no token; -inf where it keeps all.

    Tokens less likely than (1 - top_p) / V have less than 1 - top_p together, so the others reach
    top_p. Mostly the few above a much higher probability do, too.
    """
    probs = scores.softmax(-1)
    num_tokens = scores.shape[-1]
    divisor = 1024 if scores.is_cpu else num_tokens
    while divisor < num_tokens:
        likely = probs >= ((1 - top_p) / divisor)[:, None]
        if bool((torch.where(likely, probs, 0.0).sum(-1) > top_p).all()):
            break
        divisor *= 8
    least = (1 - top_p) / min(divisor, num_tokens) * (1 - 2.0**-10)  # rounding never matters
    return least.log() + scores.logsumexp(-1)


def _mass(scores: Tensor) -> Tensor:
    """Sum [S] of what tokens weigh relative to the most likely one."""
    return (scores - scores.amax(-1, keepdim=True)).exp().sum(-1)


def _top_p_mask(scores: Tensor, mass: Tensor, top_p: Tensor) -> Tensor:
    """The smallest set of tokens that reaches top_p of `mass` [S]: bool [S, W].

    The mass is that of all tokens before `_narrow` left some out: without it the others would seem
    more likely than they are, and the set would be too small.
    """
    probs = (scores - scores.amax(-1, keepdim=True)).exp() / mass[:, None]
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    needed = before < (top_p * (1 - SLACK))[:, None]
    needed[:, 0] = True
    return torch.empty_like(needed).scatter_(1, order, needed)


def _search(scores: Tensor, uniform: Tensor) -> Tensor:
    """The first column whose cumulative probability exceeds `uniform` [S]: int64 [S].

    Looks for the block of tokens first, and then inside it: only one block per row needs its
    running sum. Sums are in double precision, which rises exactly where a token has a probability.
    """
    num_tokens = scores.shape[-1]
    blocks = _in_blocks(_in_blocks(scores).flatten(1).softmax(-1))
    mass = blocks.sum(-1).double()
    running = mass.cumsum(-1)
    target = uniform.double()[:, None] * running[:, -1:]
    block = torch.searchsorted(running, target, right=True).clamp_(max=mass.shape[-1] - 1)

    inside = _gather_block(blocks, block).double().cumsum(-1)
    rest = target - (running - mass).gather(1, block)
    rest = torch.minimum(rest.clamp_(min=0), inside[:, -1:] * (1 - 2.0**-50))
    offset = torch.searchsorted(inside, rest, right=True)
    return (block * _BLOCK + offset)[:, 0].clamp_(max=num_tokens - 1)


def _argmax(logits: Tensor) -> Tensor:
    """The first of the largest logits: int64 [S]. On the CPU ten times as fast as torch's own."""
    blocks = _in_blocks(logits)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    return block[:, 0] * _BLOCK + _gather_block(blocks, block).argmax(-1)


def _in_blocks(values: Tensor) -> Tensor:
    """values [S, W] as [S, blocks, _BLOCK]; the last block is filled up with -inf."""
    missing = -values.shape[-1] % _BLOCK
    if missing:
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    return values.reshape(len(values), -1, _BLOCK)


def _gather_block(blocks: Tensor, block: Tensor) -> Tensor:
    """Of blocks [S, N, _BLOCK], the one that block [S, 1] names in each row: [S, _BLOCK]."""
    return blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0]
