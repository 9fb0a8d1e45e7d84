"""Whole decode steps as CUDA graphs: gather by row, forward, logits, draw, write back, advance.

    N bucket: sequences of a graph, padded up    K kind: how its tokens are drawn

Everything a step needs is on the device already: rows and positions lie in fixed buffers that the
graph itself advances, so a step whose rows are those of the last one uploads nothing. Graphs are
captured when a bucket is needed for the second time, or in advance, while nothing else is to do.
They share one pool of memory: steps run one after another, so their activations may overlap.
"""

import logging
from collections import Counter
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pagedcore.execution.batch import DeviceBatch, adapters_of
from pagedcore.execution.device_state import DeviceState
from pagedcore.execution.logits import upload
from pagedcore.execution.ops import Ops, StepBatch
from pagedcore.step import Int32, Int64, StepPlan

logger = logging.getLogger(__name__)


class DrawKind(Enum):
    """What a graph's rows have in common."""

    GREEDY = "greedy"
    PLAIN = "plain"
    """Temperatures, and no filter."""
    FILTERED = "filtered"


class DecodeKey(NamedTuple):
    """What a graph is captured for."""

    size: int
    kind: DrawKind
    adapted_layers: int = 0
    """The layers that tokens' adapters may change, see `DeviceState`; 0 without any adapter."""


class DecodeStep(Protocol):
    """What is captured: a forward pass, logits and a draw."""

    def __call__(
        self, token_ids: Tensor, batch: StepBatch, rows: Tensor, num_known: Tensor, kind: DrawKind
    ) -> tuple[Tensor, Tensor]:
        """Tokens int64 [N], and the logits [N, V] they were drawn from."""
        ...


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Sizes that graphs are captured for: fine where a step is short, coarse where it is long."""
    steps = ((1, 2, 1), (2, 4, 2), (4, 8, 4), (8, 32, 8), (32, 128, 16), (128, 256, 32))
    sizes = [n for start, end, step in steps for n in range(start, end, step)]
    sizes += range(256, max_num_seqs + 64, 64)
    return [n for n in sizes if n < max_num_seqs] + [max_num_seqs]


class ExtendStep(Protocol):
    """The same for steps of several tokens per sequence; the last token of each draws."""

    def __call__(self, step: DeviceBatch, kind: DrawKind) -> tuple[Tensor, Tensor]:
        """Tokens int64 [K], and the logits [K, V] they were drawn from."""
        ...


class GraphRecorder:
    """Captures graphs. Those of one recorder share memory, since they run one after another."""

    def __init__(self, ops: Ops, device: torch.device) -> None:
        self._ops = ops
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Run once, which compiles and sets up what must not happen in a capture, and capture.

        None when an operation turns out to have no kernel here, and what stands in for it reads on
        the host.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
            if not self._ops.supports_graphs:
                return None
            # torch.cuda.graph() would collect garbage and empty the allocator's cache each time
            graph.capture_begin(pool=self._pool)
            try:
                run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph


class AdaptedKey(Protocol):
    """The part of a graph's key that says which adapters it was captured with."""

    @property
    def adapted_layers(self) -> int:
        """See `DecodeKey`."""
        ...


Key = TypeVar("Key", bound=AdaptedKey)


def drop_stale(graphs: dict[Key, torch.cuda.CUDAGraph], key: Key) -> None:
    """Free the graphs of fewer adapted layers than `key` has: no step will ask for them."""
    stale = [other for other in graphs if 0 < other.adapted_layers < key.adapted_layers]
    if stale:
        torch.cuda.synchronize()
    for other in stale:
        del graphs[other]


class DecodeGraphs:
    """Runs pure decode steps. `step` is what one consists of; `max_num_seqs` is the largest N."""

    def __init__(
        self,
        step: DecodeStep,
        ops: Ops,
        state: DeviceState,
        recorder: "GraphRecorder",
        *,
        max_num_seqs: int,
        block_size: int,
    ) -> None:
        self._recorder = recorder
        self._step = step
        self._ops = ops
        self._state = state
        self._block_size = block_size
        self._sizes = bucket_sizes(max_num_seqs)
        self._bucket_of = np.repeat(self._sizes, np.diff([0, *self._sizes])).tolist()
        device = state.tokens.device
        self._rows = torch.full(
            (max_num_seqs,), state.padding_row, dtype=torch.int64, device=device
        )
        self._positions = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._query_start = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._drawn = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._last: Int32 | None = None
        self._num_filled = 0
        self._uses: Counter[DecodeKey] = Counter()
        self._graphs: dict[DecodeKey, torch.cuda.CUDAGraph] = {}
        self._ahead = [
            (n, kind, has_adapters)
            for n in self._sizes
            for has_adapters in ([False] if state.adapter_slots is None else [False, True])
            for kind in (DrawKind.PLAIN, DrawKind.GREEDY)
        ]

    def run(self, plan: StepPlan, kind: DrawKind, *, has_adapters: bool = False) -> Tensor | None:
        """Start a step in which every sequence runs one token and draws one; None: not captured.

        Returns int64 [S] on the device, valid until the next step: see `Ops.advance_rows`.
        """
        num_seqs = len(plan.rows)
        key = self._key(self._bucket_of[num_seqs - 1], kind, has_adapters)
        graph = self._graphs.get(key)
        if graph is None:
            self._uses[key] += 1
            if self._uses[key] < 2:
                self._last = None
                return None
            graph = self._capture(key)
            if graph is None:
                return None
        if self._last is not plan.rows:
            self._write(plan.rows, plan.num_computed)
        graph.replay()
        return self._drawn[:num_seqs]

    def forget_rows(self) -> None:
        """Positions have to be uploaded again: a step ran that these graphs did not, or a row has
        another sequence now.
        """
        self._last = None

    def capture_next(self, largest: int) -> bool:
        """Capture one more of the common graphs in advance, small ones first: those of up to
        `largest` sequences. False when there is none left.
        """
        while self._ahead and self._ahead[0][0] <= largest:
            size, kind, has_adapters = self._ahead.pop(0)
            key = self._key(size, kind, has_adapters)
            if key not in self._graphs and bool(key.adapted_layers) == has_adapters:
                self._capture(key)
                return True
        return False

    def _key(self, size: int, kind: DrawKind, has_adapters: bool) -> DecodeKey:
        return DecodeKey(size, kind, self._state.adapted_layers if has_adapters else 0)

    def _write(self, rows: Int32, num_computed: Int32) -> None:
        num_seqs = len(rows)
        filled = max(num_seqs, self._num_filled)  # what an earlier step left behind is padded
        both: Int64 = np.zeros((2, filled), np.int64)
        both[0] = self._state.padding_row
        both[0, :num_seqs], both[1, :num_seqs] = rows, num_computed
        uploaded = upload(both, self._rows.device)
        self._rows[:filled].copy_(uploaded[0])
        self._positions[:filled].copy_(uploaded[1])
        self._last, self._num_filled = rows, num_seqs

    def _capture(self, key: DecodeKey) -> torch.cuda.CUDAGraph | None:
        drop_stale(self._graphs, key)
        self._last = None
        self._rows.fill_(self._state.padding_row)
        self._positions.zero_()
        self._num_filled = 0
        graph = self._recorder.record(lambda: self._run_once(key))
        if graph is None:
            return None
        self._graphs[key] = graph
        logger.debug("captured a decode graph for %d sequences (%s)", key.size, key.kind.value)
        return graph

    def _run_once(self, key: DecodeKey) -> None:
        state, ops, size = self._state, self._ops, key.size
        rows, positions = self._rows[:size], self._positions[:size]
        num_known = positions + 1
        token_ids, rows_int32, context_len, slots = ops.decode_inputs(
            state.tokens, state.block_tables, rows, positions, self._block_size
        )
        batch = StepBatch(
            positions=positions,
            rows=rows_int32,
            query_start=self._query_start[: size + 1],
            context_len=context_len,
            block_tables=state.block_tables,
            slots=slots,
            num_single=size,
            max_query_len=1,
            max_context_len=state.tokens.shape[1] - 1,
            adapters=adapters_of(state, rows, size) if key.adapted_layers else None,
        )
        drawn, logits = self._step(token_ids, batch, rows, num_known, key.kind)
        marked = ops.advance_rows(drawn, logits, state.tokens, rows, positions)
        self._drawn[:size].copy_(marked)
