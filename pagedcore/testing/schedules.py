"""Ways to run prompts through a paged model that must all give the same logits."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pagedcore.testing.paged_model import PagedModel

Prompts = Sequence[Sequence[int]]

CHUNK = 7
"""Tokens of a prompt per step, in chunks: no block size divides it."""

NUM_DECODED = 6
"""Tokens at the end of a prompt that run one by one."""


def make_prompts(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Prompts of these lengths, of tokens below `vocab_size`."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]


def whole(model: PagedModel, prompts: Prompts) -> list[Tensor]:
    """Each prompt alone in one step."""
    return [model.run(prompt, row=row) for row, prompt in enumerate(prompts)]


def chunked(model: PagedModel, prompts: Prompts) -> list[Tensor]:
    """Each prompt alone, a few tokens per step."""
    return [model.run(prompt, row=row, chunk=CHUNK) for row, prompt in enumerate(prompts)]


def decoded(model: PagedModel, prompts: Prompts) -> list[Tensor]:
    """The end of each prompt token by token, as a decode runs."""
    logits = []
    for row, prompt in enumerate(prompts):
        begun = max(0, len(prompt) - NUM_DECODED)
        parts = [prompt[:begun]] * bool(begun) + [[token] for token in prompt[begun:]]
        logits.append(torch.cat([model.step({row: part})[row] for part in parts]))
    return logits


def batched(model: PagedModel, prompts: Prompts) -> list[Tensor]:
    """All prompts side by side, in steps that mix single tokens with chunks."""
    parts: list[list[Tensor]] = [[] for _ in prompts]
    sizes = [(1, CHUNK, 2 * CHUNK)[row % 3] for row in range(len(prompts))]
    while any(model.lengths[row] < len(prompt) for row, prompt in enumerate(prompts)):
        work = {}
        for row, prompt in enumerate(prompts):
            at = model.lengths[row]
            size = 2 * CHUNK if at == 0 else sizes[row]
            if at < len(prompt):
                work[row] = prompt[at : at + size]
        for row, logits in model.step(work).items():
            parts[row].append(logits)
    return [torch.cat(part) for part in parts]


def in_one_piece(model: PagedModel, prompts: Prompts) -> list[Tensor]:
    """Each prompt alone, with a cache of one block per sequence: nothing is paged."""
    block_size = model.block_size
    model.new_caches(1 << (max(map(len, prompts)) - 1).bit_length())
    logits = whole(model, prompts)
    model.new_caches(block_size)
    return logits


def cached(model: PagedModel, prompts: Prompts) -> list[Tensor]:
    """Each prompt again, after blocks that another row computed; what was found, from there."""
    logits = []
    for prompt in prompts:
        model.forget()
        cold = model.run(prompt, row=0)
        num_blocks = (len(prompt) - 1) // model.block_size
        model.share(0, 1, num_blocks)
        begun = num_blocks * model.block_size
        logits.append(torch.cat([cold[:begun], model.run(prompt[begun:], row=1)]))
    return logits


SCHEDULES: Mapping[str, Callable[[PagedModel, Prompts], list[Tensor]]] = {
    "whole": whole,
    "chunked": chunked,
    "decoded": decoded,
    "batched": batched,
    "in one piece": in_one_piece,
    "cached": cached,
}
"""By the words that a report has for them. Each begins with `PagedModel.forget`."""
