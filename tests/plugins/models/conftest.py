"""Models over a paged cache, driven by hand: no scheduler, no executor."""

from dataclasses import replace

import pytest
import torch

import pagedcore_models
from pagedcore.cache_spec import group_layers
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import StepBatch
from pagedcore.execution.quantizer import Unquantized
from pagedcore.execution.torch_ops import TorchOps

BLOCK_SIZE = 4
MAX_BLOCKS = 80


class PagedModel:
    """A model of a folder with caches for `num_rows` sequences, whose blocks are interleaved."""

    def __init__(self, folder, *, num_rows=4, max_positions=256):
        checkpoint = Checkpoint(folder)
        self.ops = TorchOps("cpu")
        model_class = pagedcore_models.pagedcore_models()[checkpoint.config["architectures"][0]]()
        build = ModelBuild(
            config=checkpoint.config,
            weights=checkpoint.shapes(torch.float32),
            quantizer=Unquantized(),
            ops=self.ops,
            dtype=torch.float32,
            device=torch.device("meta"),
            max_positions=max_positions,
        )
        model_class(build)
        checkpoint.check_all_taken()
        weights = checkpoint.tensors(torch.float32, torch.device("cpu"))
        with torch.inference_mode():
            self.model = model_class(replace(build, weights=weights, device=torch.device("cpu")))
        weights.finish()
        groups = group_layers(self.model.cache_specs)
        self.caches = [None] * len(self.model.cache_specs)
        for number, group in enumerate(groups):
            for layer in group.layers:
                self.caches[layer] = self.ops.new_cache(
                    group.spec,
                    number,
                    1 + num_rows * MAX_BLOCKS,
                    BLOCK_SIZE,
                    torch.float32,
                    torch.device("cpu"),
                )
        blocks = 1 + torch.arange(MAX_BLOCKS * num_rows, dtype=torch.int32)
        self.tables = blocks.view(MAX_BLOCKS, num_rows).T.repeat(len(groups), 1, 1)
        self.lengths = [0] * num_rows

    @torch.inference_mode()
    def step(self, work):
        """Run tokens by row, such as {0: [5, 6], 2: [7]}: their logits, by row."""
        order = sorted(work, key=lambda row: len(work[row]) > 1)  # single tokens come first
        counts = [len(work[row]) for row in order]
        starts = [self.lengths[row] for row in order]
        spans = list(zip(starts, counts, strict=True))
        positions = torch.cat([torch.arange(s, s + n) for s, n in spans])
        row_of = torch.tensor(order).repeat_interleave(torch.tensor(counts))
        blocks = self.tables[:, row_of, positions // BLOCK_SIZE].long()
        batch = StepBatch(
            positions=positions,
            rows=torch.tensor(order, dtype=torch.int32),
            query_start=torch.tensor([0, *counts]).cumsum(0).int(),
            context_len=torch.tensor([s + n for s, n in spans], dtype=torch.int32),
            block_tables=self.tables,
            slots=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
            num_single=counts.count(1),
            max_query_len=max(counts),
            max_context_len=max(s + n for s, n in spans),
        )
        token_ids = torch.tensor([token for row in order for token in work[row]])
        self.ops.begin_step(batch)
        logits = self.model.logits(self.model.forward(token_ids, batch, self.caches))
        for row in order:
            self.lengths[row] += len(work[row])
        return dict(zip(order, logits.split(counts), strict=True))

    def greedy(self, prompt, num_tokens, *, chunk=1000, row=0):
        """The tokens that follow a prompt, which runs in chunks."""
        for at in range(0, len(prompt), chunk):
            logits = self.step({row: prompt[at : at + chunk]})[row]
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < num_tokens:
            tokens.append(int(self.step({row: tokens[-1:]})[row][-1].argmax()))
        return tokens


@pytest.fixture(scope="session")
def paged():
    return PagedModel


@pytest.fixture(scope="session")
def prompts():
    """Four prompts of different lengths, of tokens that all tiny models have."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 320, (length,), generator=generator).tolist() for length in (37, 5, 1, 18)
    ]
