"""Short extensions as CUDA graphs: a few new tokens behind prefixes that are cached.

    T tokens, padded up to a bucket    S sequences, padded up to MAX_SEQS

Such a step takes the device a few milliseconds, and the host three times as long to launch, kernel
by kernel. One upload fills the buffers that a graph reads; sequences of one token are extensions
here too, so that the graph does not depend on how many there are.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from pagedcore.execution.batch import pack, pad, unpack
from pagedcore.execution.device_state import DeviceState
from pagedcore.execution.graphs import DrawKind, ExtendStep, GraphRecorder
from pagedcore.execution.logits import upload
from pagedcore.execution.ops import Ops
from pagedcore.step import StepPlan

MAX_SEQS = 4
BUCKETS = (16, 32, 64, 128, 256, 512)


class ExtendGraphs:
    """Runs steps of few tokens in which every sequence draws one."""

    def __init__(
        self,
        step: ExtendStep,
        ops: Ops,
        state: DeviceState,
        recorder: GraphRecorder,
        *,
        block_size: int,
        max_num_tokens: int,
    ) -> None:
        self._step = step
        self._ops = ops
        self._state = state
        self._recorder = recorder
        self._block_size = block_size
        self._buckets = [n for n in BUCKETS if n <= max_num_tokens]
        largest = 2 * BUCKETS[-1] + 6 * MAX_SEQS + 1
        self._values = torch.zeros(largest, dtype=torch.int64, device=state.tokens.device)
        self._drawn = torch.zeros(MAX_SEQS, dtype=torch.int64, device=state.tokens.device)
        self._uses: Counter[tuple[int, DrawKind]] = Counter()
        self._graphs: dict[tuple[int, DrawKind], torch.cuda.CUDAGraph] = {}
        self._ahead = [(n, DrawKind.PLAIN) for n in reversed(self._buckets)]
        self._ahead += [(n, DrawKind.GREEDY) for n in reversed(self._buckets)]

    def suits(self, plan: StepPlan) -> bool:
        """Whether a step in which every sequence draws is short enough."""
        return (
            len(plan.rows) <= MAX_SEQS
            and bool(self._buckets)
            and (plan.num_tokens <= self._buckets[-1])
        )

    def run(self, plan: StepPlan, kind: DrawKind) -> Tensor | None:
        """Start a step that `suits`; None: not captured. The result is as `DecodeGraphs.run`'s."""
        num_tokens, num_seqs = plan.num_tokens, len(plan.rows)
        key = (next(n for n in self._buckets if n >= num_tokens), kind)
        graph = self._graphs.get(key)
        if graph is None:
            self._uses[key] += 1
            if self._uses[key] < 2:
                return None
            graph = self._capture(key)
            if graph is None:
                return None
        packed = pack(plan, np.arange(num_seqs))
        padded = pad(packed, key[0], MAX_SEQS, self._state.padding_row)
        self._values[: len(padded.values)].copy_(upload(padded.values, self._values.device))
        graph.replay()
        return self._drawn[:num_seqs]

    def capture_next(self) -> bool:
        """Capture one more in advance; False when there is none left."""
        while self._ahead:
            key = self._ahead.pop(0)
            if key not in self._graphs:
                self._capture(key)
                return True
        return False

    def _capture(self, key: tuple[int, DrawKind]) -> torch.cuda.CUDAGraph | None:
        size, kind = key
        empty = np.zeros(0, np.int32)
        nothing = pack(
            StepPlan(empty, empty, empty, np.zeros(0, np.bool_), 0), np.zeros(0, np.int64)
        )
        padded = pad(nothing, size, MAX_SEQS, self._state.padding_row)
        self._values[: len(padded.values)].copy_(upload(padded.values, self._values.device))
        graph = self._recorder.record(lambda: self._run_once(padded.sizes, kind))
        if graph is not None:
            self._graphs[key] = graph
        return graph

    def _run_once(self, sizes: list[int], kind: DrawKind) -> None:
        state = self._state
        step = unpack(
            self._values[: sum(sizes)],
            sizes,
            state,
            self._block_size,
            drawing=np.arange(MAX_SEQS),
            num_single=0,
            max_query_len=sizes[0],
            max_context_len=state.tokens.shape[1] - 1,
        )
        drawn, logits = self._step(step, kind)
        positions = step.num_known - 1
        marked = self._ops.advance_rows(drawn, logits, state.tokens, step.rows, positions)
        self._drawn.copy_(marked)
