"""What goes into each layer of a model while it reads a text, and the scales that follow from it.

T tokens   h hidden size
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pagedcore.cache_spec import group_layers
from pagedcore.errors import ConfigError, ModelError
from pagedcore.execution.batch import slots_of
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.kv_formats import as_is
from pagedcore.execution.model import Model, ModelBuild, Weights
from pagedcore.execution.ops import LayerCache, Ops, StepBatch
from pagedcore.execution.quantizing.balance import (
    Balance,
    Balanced,
    Inputs,
    best_scale,
    source_of,
)
from pagedcore.execution.quantizing.layers import (
    WEIGHT,
    Group,
    Layers,
    Logged,
    Observe,
    Watcher,
    sort_layers,
)
from pagedcore.execution.quantizing.writer import WeightWriter
from pagedcore.execution.weight_reader import WeightReader

CHUNK = 512
"""Tokens that are read as one sequence."""

MAX_ROWS = 256
"""Of a layer's inputs: those that scales are tried out with."""

FIRST_LAYERS = 4
"""Layers that must be the same with scales as without."""

MAX_CHANGE = 0.01
"""Of their hidden states, as a share of these."""

Report = Callable[[int, int], None]
"""Is told how many are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Builds and runs the model of a checkpoint."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    """The model's, complete."""

    kind: type[Model]
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    max_positions: int

    def find_layers(self) -> Layers:
        """What the model multiplies with; raises ModelError for what `Checkpoint` refuses."""
        taken: list[str] = []
        watcher = Watcher(taken)
        weights = Logged(self.checkpoint.shapes(self.dtype), taken)
        self.kind(self._build(weights, watcher, torch.device("meta")))
        self.checkpoint.check_all_taken()
        return sort_layers(self.checkpoint, watcher.groups)

    def load(self, observe: Observe | None = None, balance: Balance | None = None) -> Model:
        """The model with its weights, whose inputs of layers `observe` is told."""
        taken: list[str] = []
        weights = self.checkpoint.tensors(self.dtype, self.device)
        balanced: Weights = weights if balance is None else Balanced(weights, balance)
        watcher = Watcher(taken, observe)
        with torch.inference_mode():
            model = self.kind(self._build(Logged(balanced, taken), watcher, self.device))
        weights.finish()
        return model

    @torch.inference_mode()
    def hidden(self, model: Model, tokens: Sequence[int]) -> Tensor:
        """The last hidden states [T, h] of one sequence."""
        groups = group_layers(model.cache_specs)
        size = self.ops.block_size
        num_blocks = -(-len(tokens) // size) + 1
        caches: list[LayerCache | None] = [None] * len(model.cache_specs)
        for number, group in enumerate(groups):
            for layer in group.layers:
                caches[layer] = self.ops.new_cache(
                    group.spec, number, num_blocks, size, as_is(self.dtype), self.device
                )
        positions = torch.arange(len(tokens), device=self.device)
        table = torch.arange(1, num_blocks, dtype=torch.int32, device=self.device)
        tables = table.expand(len(groups), 1, -1).contiguous()
        batch = StepBatch(
            positions=positions,
            rows=torch.zeros(1, dtype=torch.int32, device=self.device),
            query_start=torch.tensor([0, len(tokens)], dtype=torch.int32, device=self.device),
            context_len=torch.tensor([len(tokens)], dtype=torch.int32, device=self.device),
            block_tables=tables,
            slots=slots_of(tables, torch.zeros_like(positions), positions, size),
            num_single=0,
            max_query_len=len(tokens),
            max_context_len=len(tokens),
        )
        self.ops.begin_step(batch)
        return model.forward(torch.tensor(tokens, device=self.device), batch, caches)

    def _build(self, weights: Weights, watcher: Watcher, device: torch.device) -> ModelBuild:
        return ModelBuild(
            config=self.config,
            weights=weights,
            quantizer=watcher,
            ops=self.ops,
            dtype=self.dtype,
            device=device,
            max_positions=self.max_positions,
        )


class _Sums:
    """Collects the inputs of a group."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0
        self._rows: list[Tensor] = []

    def add(self, x: Tensor, max_rows: int) -> None:
        """Inputs [T, in], of which a few are kept."""
        total = x.float().abs().sum(0)
        self._total = total if self._total is None else self._total + total
        self._count += len(x)
        self._rows.append(x[:: -(-len(x) // max_rows)].clone())

    def inputs(self) -> Inputs:
        """All that was added."""
        assert self._total is not None
        return Inputs(self._total / self._count, torch.cat(self._rows))


def observe(runner: Runner, chunks: Sequence[Sequence[int]], report: Report) -> dict[Group, Inputs]:
    """What goes into each layer in some texts."""
    sums: dict[Group, _Sums] = {}
    max_rows = max(1, MAX_ROWS // len(chunks))

    def look(group: Group, x: Tensor) -> None:
        if not x.is_meta:
            sums.setdefault(group, _Sums()).add(x, max_rows)

    model = runner.load(look)
    for number, chunk in enumerate(chunks):
        if not runner.hidden(model, chunk).isfinite().all():
            raise ModelError("the model's hidden states are not finite for the calibration text")
        report(number + 1, len(chunks))
    return {group: each.inputs() for group, each in sums.items()}


@torch.inference_mode()
def find_balance(
    runner: Runner,
    layers: Layers,
    inputs: Mapping[Group, Inputs],
    writer: WeightWriter,
    report: Report,
) -> Balance:
    """The best scales of all layers whose input something makes that can be scaled."""
    stored = runner.checkpoint.stored
    balance = Balance()
    with closing(WeightReader(runner.device, [])) as reader:
        for number, group in enumerate(layers.groups):
            source = source_of(group, stored)
            if source is not None and group in inputs:
                weights = [reader.read(stored[name + WEIGHT]).float() for name in group]
                scale = best_scale(weights, inputs[group], writer)
                if scale is not None:
                    balance.add(group, source, scale.cpu())
            report(number + 1, len(layers.groups))
    return balance


def verify(runner: Runner, balance: Balance, chunk: Sequence[int]) -> None:
    """Raise ConfigError unless the model with scales is the same one, but for rounding.

    The names of norms and layers promise that; another architecture may mean something else by
    them. Its first layers show it, in float32, where there is little rounding to be taken for it.
    """
    first = replace(runner, config=_first_layers(runner.config), dtype=torch.float32)
    expected, found = (first.hidden(first.load(balance=each), chunk) for each in (None, balance))
    change = float((found - expected).norm() / expected.norm())
    if not change < MAX_CHANGE:
        raise ConfigError(
            f"scales from a calibration text would change what {runner.kind.__name__} computes, by "
            f"{change:.0%}: its norms are not what their names say. Leave out --calibration."
        )


def _first_layers(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a model with few layers; the same where it is not known how many it has."""
    count = config.get("num_hidden_layers")
    if not isinstance(count, int) or count <= FIRST_LAYERS:
        return config
    lists = {
        name: value[:FIRST_LAYERS]
        for name, value in config.items()
        if isinstance(value, list) and len(value) == count
    }
    return {**config, **lists, "num_hidden_layers": FIRST_LAYERS}


def balance_by_text(
    runner: Runner,
    layers: Layers,
    tokens: Sequence[int],
    writer: WeightWriter,
    reports: tuple[Report, Report],
) -> Balance:
    """Scales for a model by what it does with a text; reports tell of the two halves of the way."""
    size = min(CHUNK, runner.max_positions)
    chunks = [tokens[first : first + size] for first in range(0, len(tokens), size)]
    inputs = observe(runner, chunks, reports[0])
    balance = find_balance(runner, layers, inputs, writer, reports[1])
    verify(runner, balance, chunks[0])
    return balance
