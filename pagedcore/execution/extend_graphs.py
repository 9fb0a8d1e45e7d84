"""Steps that extend a few sequences as CUDA graphs, beside sequences that decode.

    N sequences of one token, padded up    E = MAX_EXTENDED longer ones, padded up
    T tokens of the longer ones, padded up

Such a step takes the device a few milliseconds, and the host three times as long to launch, kernel
by kernel. One upload fills the buffers that a graph reads. A graph belongs to a bucket of N and one
of T; it is captured when it is needed for the second time, or in advance, while nothing else is to
do.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedcore.execution.batch import PackedPlan, pack, pad_sequences, pad_tokens, unpack
from pagedcore.execution.device_state import DeviceState
from pagedcore.execution.graphs import DrawKind, ExtendStep, GraphRecorder, drop_stale
from pagedcore.execution.logits import upload
from pagedcore.execution.ops import Ops
from pagedcore.step import StepPlan

MAX_EXTENDED = 4
SINGLES = (0, 8, 16, 32, 64)
"""Buckets of N."""

TOKENS = (16, 32, 64, 128, 256, 512, 768, 1024)
"""Buckets of T: padding costs time, and beyond the last the device takes longer than the host."""


@dataclass(frozen=True, slots=True)
class _Key:
    num_single: int
    num_tokens: int
    kind: DrawKind
    adapted_layers: int = 0

    @property
    def num_seqs(self) -> int:
        return self.num_single + MAX_EXTENDED


class ExtendGraphs:
    """Runs steps with few longer sequences, in which every sequence draws a token."""

    def __init__(
        self,
        step: ExtendStep,
        ops: Ops,
        state: DeviceState,
        recorder: GraphRecorder,
        *,
        block_size: int,
        max_num_tokens: int,
        max_num_seqs: int,
    ) -> None:
        """The longest step has `max_num_tokens`, in `max_num_seqs` sequences."""
        self._step = step
        self._ops = ops
        self._state = state
        self._recorder = recorder
        self._block_size = block_size
        self._singles = [n for n in SINGLES if n <= max_num_seqs]
        self._tokens = [n for n in TOKENS if n <= max_num_tokens]
        device = state.tokens.device
        num_seqs = SINGLES[-1] + MAX_EXTENDED
        most = 2 * (SINGLES[-1] + TOKENS[-1]) + 6 * num_seqs + 1
        self._values = torch.zeros(most, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        self._uses: Counter[_Key] = Counter()
        self._graphs: dict[_Key, torch.cuda.CUDAGraph] = {}
        self._ahead = [
            (n, tokens, kind, has_adapters)
            for n in self._singles
            for has_adapters in ([False] if state.adapter_slots is None else [False, True])
            for kind in (DrawKind.PLAIN, DrawKind.GREEDY)
            for tokens in reversed(self._tokens)
        ]

    def suits(self, plan: StepPlan) -> bool:
        """Whether a step in which every sequence draws is short enough."""
        num_single = plan.num_single
        return (
            bool(self._tokens)
            and len(plan.rows) - num_single <= MAX_EXTENDED
            and num_single <= self._singles[-1]
            and plan.num_tokens - num_single <= self._tokens[-1]
        )

    def run(self, plan: StepPlan, kind: DrawKind, *, has_adapters: bool = False) -> Tensor | None:
        """Start a step that `suits`; None: not captured. The result is as `DecodeGraphs.run`'s."""
        num_single, num_seqs = plan.num_single, len(plan.rows)
        num_tokens = plan.num_tokens - num_single
        key = self._key(
            next(n for n in self._singles if n >= num_single),
            next(n for n in self._tokens if n >= num_tokens),
            kind,
            has_adapters,
        )
        graph = self._graphs.get(key)
        if graph is None:
            self._uses[key] += 1
            if self._uses[key] < 2:
                return None
            graph = self._capture(key)
            if graph is None:
                return None
        self._write(self._padded(plan, key))
        graph.replay()
        if num_single == key.num_single:
            return self._drawn[:num_seqs]
        extended = self._drawn[key.num_single :][: num_seqs - num_single]
        return torch.cat((self._drawn[:num_single], extended))

    def capture_next(self) -> bool:
        """Capture one more in advance; False when there is none left."""
        while self._ahead:
            num_single, num_tokens, kind, has_adapters = self._ahead.pop(0)
            key = self._key(num_single, num_tokens, kind, has_adapters)
            if key not in self._graphs and bool(key.adapted_layers) == has_adapters:
                self._capture(key)
                return True
        return False

    def _key(self, num_single: int, num_tokens: int, kind: DrawKind, has_adapters: bool) -> _Key:
        adapted_layers = self._state.adapted_layers if has_adapters else 0
        return _Key(num_single, num_tokens, kind, adapted_layers)

    def _padded(self, plan: StepPlan, key: _Key) -> PackedPlan:
        padding_row = self._state.padding_row
        padded = pad_sequences(plan, key.num_single, MAX_EXTENDED, padding_row)
        packed = pack(padded, np.arange(key.num_seqs))
        return pad_tokens(packed, key.num_single + key.num_tokens, padding_row)

    def _write(self, packed: PackedPlan) -> None:
        self._values[: len(packed.values)].copy_(upload(packed.values, self._values.device))

    def _capture(self, key: _Key) -> torch.cuda.CUDAGraph | None:
        drop_stale(self._graphs, key)
        empty = np.zeros(0, np.int32)
        packed = self._padded(StepPlan(empty, empty, empty, np.zeros(0, np.bool_), 0), key)
        self._write(packed)
        graph = self._recorder.record(lambda: self._run_once(packed.sizes, key))
        if graph is not None:
            self._graphs[key] = graph
        return graph

    def _run_once(self, sizes: list[int], key: _Key) -> None:
        state = self._state
        step = unpack(
            self._values[: sum(sizes)],
            sizes,
            state,
            self._block_size,
            drawing=np.arange(key.num_seqs),
            num_single=key.num_single,
            max_query_len=key.num_tokens,
            max_context_len=state.tokens.shape[1] - 1,
            has_adapters=key.adapted_layers > 0,
        )
        drawn, logits = self._step(step, key.kind)
        positions = step.num_known - 1
        marked = self._ops.advance_rows(drawn, logits, state.tokens, step.rows, positions)
        self._drawn[: key.num_seqs].copy_(marked)
