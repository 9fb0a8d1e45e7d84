"""A model over a paged cache, driven by hand: no scheduler, no executor.

T tokens of a step   S sequences in it   R rows   G cache groups   M blocks per row   V vocabulary
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pagedcore.cache_spec import group_layers
from pagedcore.execution import headless
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.kv_formats import KVFormat, as_is
from pagedcore.execution.model import Model, ModelBuild
from pagedcore.execution.model_config import complete_config
from pagedcore.execution.ops import LayerCache, Ops, StepBatch
from pagedcore.execution.quantizer import Quantizer, Unquantized
from pagedcore.execution.torch_ops import TorchOps


class PagedRows:
    """A model with caches for `num_rows` sequences, whose blocks are interleaved."""

    def __init__(
        self,
        model: Model,
        ops: Ops,
        kv_format: KVFormat,
        *,
        device: torch.device,
        num_rows: int = 4,
        block_size: int = 4,
        max_positions: int = 256,
    ) -> None:
        """The caches are as `ops` makes them, which must be what the model is made of."""
        self.model = model
        self.ops = ops
        self.groups = group_layers(model.cache_specs)
        self._kv_format = kv_format
        self._device = device
        self._max_positions = max_positions
        self._num_rows = num_rows
        self.new_caches(block_size)

    def new_caches(self, block_size: int) -> None:
        """Begin again with empty caches, whose blocks have another size."""
        self.block_size = block_size
        max_blocks = -(-self._max_positions // block_size)
        num_blocks = 1 + self._num_rows * max_blocks
        self.caches: list[LayerCache | None] = [None] * len(self.model.cache_specs)
        for number, group in enumerate(self.groups):
            for layer in group.layers:
                self.caches[layer] = self.ops.new_cache(
                    group.spec, number, num_blocks, block_size, self._kv_format, self._device
                )
        self.forget()

    def forget(self) -> None:
        """Begin again with rows that have no past; what the blocks hold stays, and is stale."""
        max_blocks = -(-self._max_positions // self.block_size)
        count = max_blocks * self._num_rows
        blocks = 1 + torch.arange(count, dtype=torch.int32, device=self._device)
        self.tables = blocks.view(max_blocks, -1).T.repeat(len(self.groups), 1, 1)
        """[G, R, M] int32."""
        self.lengths = [0] * self._num_rows
        """Positions of each row that are in the cache."""

    def share(self, source: int, target: int, num_blocks: int) -> None:
        """Let a row begin with the first blocks of another, as if it had found them cached."""
        self.tables[:, target, :num_blocks] = self.tables[:, source, :num_blocks]
        self.lengths[target] = num_blocks * self.block_size

    @torch.inference_mode()
    def step(self, work: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Run tokens by row, such as {0: [5, 6], 2: [7]}: the logits [its tokens, V] of each."""
        hidden = self.forward(work)
        logits = self.model.logits(torch.cat(list(hidden.values())))
        counts = [len(part) for part in hidden.values()]
        return dict(zip(hidden, logits.split(counts), strict=True))

    @torch.inference_mode()
    def forward(
        self,
        work: Mapping[int, Sequence[int]],
        types: Mapping[int, Sequence[int]] | None = None,
    ) -> dict[int, Tensor]:
        """As `step`, but what logits are made of: hidden states [its tokens, h] of each.

        `types` are those of all tokens; see `StepBatch.token_types`.
        """
        order = sorted(work, key=lambda row: len(work[row]) > 1)  # single tokens come first
        counts = [len(work[row]) for row in order]
        starts = [self.lengths[row] for row in order]
        spans = list(zip(starts, counts, strict=True))
        on = self._device
        positions = torch.cat([torch.arange(s, s + n) for s, n in spans]).to(on)
        row_of = torch.tensor(order).repeat_interleave(torch.tensor(counts)).to(on)
        blocks = self.tables[:, row_of, positions // self.block_size].long()
        batch = StepBatch(
            positions=positions,
            rows=torch.tensor(order, dtype=torch.int32, device=on),
            query_start=torch.tensor([0, *counts]).cumsum(0).int().to(on),
            context_len=torch.tensor([s + n for s, n in spans], dtype=torch.int32, device=on),
            block_tables=self.tables,
            slots=blocks * self.block_size + positions % self.block_size,
            num_single=counts.count(1),
            max_query_len=max(counts),
            max_context_len=max(s + n for s, n in spans),
        )
        token_ids = torch.tensor([token for row in order for token in work[row]], device=on)
        if types is not None:
            flat = [kind for row in order for kind in types[row]]
            batch.token_types = torch.tensor(flat, device=on)
        self.ops.begin_step(batch)
        hidden = self.model.forward(token_ids, batch, self.caches)
        for row in order:
            self.lengths[row] += len(work[row])
        return dict(zip(order, hidden.split(counts), strict=True))

    def run(self, prompt: Sequence[int], *, row: int = 0, chunk: int = 1000) -> Tensor:
        """The logits [its tokens, V] of a prompt that runs in chunks."""
        chunks = [prompt[at : at + chunk] for at in range(0, len(prompt), chunk)]
        return torch.cat([self.step({row: tokens})[row] for tokens in chunks])

    def greedy(
        self, prompt: Sequence[int], num_tokens: int, *, chunk: int = 1000, row: int = 0
    ) -> list[int]:
        """The tokens that follow a prompt, which runs in chunks."""
        tokens = [int(self.run(prompt, row=row, chunk=chunk)[-1].argmax())]
        while len(tokens) < num_tokens:
            tokens.append(int(self.step({row: tokens[-1:]})[row][-1].argmax()))
        return tokens


class PagedModel(PagedRows):
    """A model of a folder, on the CPU, with caches for `num_rows` sequences."""

    def __init__(
        self,
        folder: Path,
        model_class: type[Model],
        *,
        ops: Ops | None = None,
        dtype: torch.dtype = torch.float32,
        quantizer: Quantizer | None = None,
        kv_format: KVFormat | None = None,
        num_rows: int = 4,
        block_size: int = 4,
        max_positions: int = 256,
    ) -> None:
        """Build it as a start does, and raise what that would: of shapes alone, then of weights."""
        ops = ops or TorchOps("cpu")
        device = torch.device("cpu")
        checkpoint = Checkpoint(folder)
        headless.complete(checkpoint)
        build = ModelBuild(
            config=complete_config(checkpoint.config, model_class),
            weights=checkpoint.shapes(dtype),
            quantizer=quantizer or Unquantized(),
            ops=ops,
            dtype=dtype,
            device=torch.device("meta"),
            max_positions=max_positions,
        )
        model_class(build)
        checkpoint.check_all_taken()
        weights = checkpoint.tensors(dtype, device)
        with torch.inference_mode():
            model = model_class(replace(build, weights=weights, device=device))
        weights.finish()
        super().__init__(
            model,
            ops,
            kv_format or as_is(dtype),
            device=device,
            num_rows=num_rows,
            block_size=block_size,
            max_positions=max_positions,
        )
