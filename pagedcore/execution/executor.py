"""Launches steps on one device, and hands over what they drew.

A launch returns at once: tokens go from step to step on the device, and to the host through pinned
memory, with an event that says when. On the CPU a launch is the step itself.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedcore.cache_spec import CacheGroup
from pagedcore.config import EngineConfig
from pagedcore.execution.adapter_store import AdapterStore
from pagedcore.execution.batch import DeviceBatch, to_device
from pagedcore.execution.device_state import DeviceState
from pagedcore.execution.extend_graphs import ExtendGraphs
from pagedcore.execution.graphs import DecodeGraphs, DrawKind, GraphRecorder
from pagedcore.execution.logits import upload
from pagedcore.execution.logits_processors import Factory, LogitsProcessors
from pagedcore.execution.logprobs import PendingLogprobs
from pagedcore.execution.model import Model
from pagedcore.execution.ops import LayerCache, Ops, StepBatch
from pagedcore.execution.pooler import NOT_FINITE, PendingVectors, Pooler
from pagedcore.execution.sampler import Drawn, Sampler
from pagedcore.pooling import PoolingInfo, Task
from pagedcore.step import Admission, Int32, Int64, StepPlan, StepResult, TokenLogprobs

_NUM_RESULTS = 4
"""Results that may be on their way to the host; two steps are in flight at most."""

_MAX_SCORES = 2**26
"""Elements of the [N, V] logits that prompt log-probabilities are made of at a time."""

_MOST_COMMON = 64
"""Sequences of a step, in most deployments most of the time: their graphs are prepared first."""

_NOT_FINITE = (
    "no token could be drawn: the model's scores were not finite numbers (NaN), or the request's "
    "allowed_token_ids and bad_words leave no token"
)


@dataclass(slots=True)
class PendingStep:
    """A step that the device may still be running."""

    num_seqs: int
    drawing: Int64
    """[K] Sequences that draw, by index in the plan."""

    drawn: Tensor
    """[K] on the host: tokens, or -1 - token where the logits were not finite."""

    done: torch.cuda.Event | None
    logprobs: PendingLogprobs | None
    prompt_logprobs: Mapping[int, list[TokenLogprobs]]
    vectors: PendingVectors | None = None

    def result(self) -> StepResult:
        """Wait for the step; raises what made it fail."""
        if self.done is not None:
            self.done.synchronize()
        drawn = self.drawn.numpy()
        bad = np.flatnonzero(drawn < 0)
        tokens = np.zeros(self.num_seqs, np.int32)
        tokens[self.drawing] = np.where(drawn < 0, -1 - drawn, drawn)
        logprobs = {}
        if self.logprobs is not None:
            entries = self.logprobs.result(tokens[self.drawing])
            logprobs = {int(self.drawing[i]): entry for i, entry in entries.items()}
        failed = dict.fromkeys(self.drawing[bad].tolist(), _NOT_FINITE)
        vectors = {} if self.vectors is None else self.vectors.result()
        for index, vector in vectors.items():
            if not np.isfinite(vector).all():
                failed[index] = NOT_FINITE
        return StepResult(
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            vectors=vectors,
            failed=failed,
        )


class Executor:
    """One model with its cache on one device. Steps run in the order of their launches."""

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        ops: Ops,
        *,
        device: torch.device,
        dtype: torch.dtype,
        caches: Sequence[LayerCache | None],
        groups: tuple[CacheGroup, ...],
        num_blocks: int,
        task: Task = "generate",
        pooling: PoolingInfo | None = None,
        startup_seconds: Mapping[str, float],
        logits_processors: Mapping[str, Factory] | None = None,
        adapters: AdapterStore | None = None,
    ) -> None:
        """`config` is resolved; `caches` has one entry per layer, of `num_blocks` blocks."""
        pooling = pooling or PoolingInfo()
        self.task = task
        self.pooling = pooling
        """What vectors the model makes."""
        block_size, max_num_seqs = config.cache.block_size, config.scheduler.max_num_seqs
        max_model_len = config.model.max_model_len
        assert block_size is not None
        assert max_num_seqs is not None
        assert max_model_len is not None
        max_num_batched_tokens = config.scheduler.max_num_batched_tokens
        assert max_num_batched_tokens is not None
        self.config = config
        self.groups = groups
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.vocab_size = model.vocab_size
        self.startup_seconds = dict(startup_seconds)
        self.overlaps = device.type == "cuda"
        """Whether a launch returns before the step has run."""
        self._max_num_seqs = max_num_seqs
        self._model = model
        self._ops = ops
        self._device = device
        self._caches = caches
        self._state = DeviceState(
            num_rows=max_num_seqs,
            max_model_len=max_model_len,
            num_groups=len(groups),
            max_blocks=-(-(max_model_len + 1) // block_size),
            device=device,
            adapters=adapters,
        )
        self.adapters = adapters
        """What requests may choose by name; None without room for any."""
        self._has_adapters = False
        self.logits_processors = LogitsProcessors(
            logits_processors or {}, vocab_size=model.vocab_size, device=device
        )
        """What requests may ask for."""
        self._sampler = Sampler(
            ops,
            num_rows=max_num_seqs + 1,
            vocab_size=model.vocab_size,
            device=device,
            logprobs_mode=config.execution.logprobs_mode,
            processors=self.logits_processors,
        )
        self._pooler = Pooler(model.logits, pooling.scored, device)
        self._prompts: dict[int, Int32] = {}
        self._kind: tuple[Int32, DrawKind | None] | None = None
        self._graphs: DecodeGraphs | None = None
        self._extend_graphs: ExtendGraphs | None = None
        is_decoder = bool(groups)  # else there is nothing to decode from
        if (
            is_decoder
            and self.overlaps
            and ops.supports_graphs
            and getattr(model, "supports_graphs", True)
            and not config.execution.enforce_eager
        ):
            recorder = GraphRecorder(ops, device)
            self._graphs = DecodeGraphs(
                self._decode,
                ops,
                self._state,
                recorder,
                max_num_seqs=max_num_seqs,
                block_size=block_size,
            )
            self._extend_graphs = ExtendGraphs(
                self._extend,
                ops,
                self._state,
                recorder,
                block_size=block_size,
                max_num_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
            )
        self._results: list[Tensor] = []
        if self.overlaps:
            self._results = [
                torch.empty(max_num_seqs, dtype=torch.int64, pin_memory=True)
                for _ in range(_NUM_RESULTS)
            ]
        self._num_launched = 0

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step; nothing here waits for the device, but prompt log-probabilities do."""
        with torch.inference_mode(), self._on_device():
            self._begin(plan)
            drawn = self._replay(plan)
            if drawn is not None:
                return self._pend(plan, np.arange(len(plan.rows)), drawn, None, {})
            return self._run(plan)

    def prepare(self) -> bool:
        """Capture one more graph in advance; False when there is nothing left to prepare.

        For whoever has no step to run: it takes a fraction of a second.
        """
        if self._graphs is None or self._extend_graphs is None:
            return False
        with torch.inference_mode(), self._on_device():
            return (
                self._graphs.capture_next(_MOST_COMMON)
                or self._extend_graphs.capture_next()
                or self._graphs.capture_next(self._max_num_seqs)
            )

    def shutdown(self) -> None:
        """Wait for steps in flight and give the device's memory back."""
        if self.overlaps:
            torch.cuda.synchronize(self._device)
        self._graphs = self._extend_graphs = None
        self._caches = ()
        del self._model
        if self.overlaps:
            torch.cuda.empty_cache()

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self.overlaps else contextlib.nullcontext()

    def _begin(self, plan: StepPlan) -> None:
        """Bring what the device keeps of each row up to date."""
        if self.adapters is not None:
            self._has_adapters = self.adapters.begin_step(plan)
        if plan.admitted:
            self._kind = None
            if self._graphs is not None:
                self._graphs.forget_rows()  # the same rows may have other sequences
            self._state.admit(plan.admitted)
            self._sampler.admit(plan.admitted)
            self._pooler.admit(plan.admitted)
            self._keep_prompts(plan.admitted)
        self._state.update_tables(plan.table_updates)
        if len(plan.copies):
            self._copy(plan.copies)

    def _keep_prompts(self, admitted: Sequence[Admission]) -> None:
        for admission in admitted:
            self._prompts.pop(admission.row, None)
            if self._sampler.wants_prompt_logprobs(admission.row) is not None:
                self._prompts[admission.row] = admission.request.prompt_token_ids

    def _copy(self, copies: Int32) -> None:
        for number, group in enumerate(self.groups):
            of_group = copies[copies[:, 0] == number, 1:]
            if len(of_group) == 0:
                continue
            uploaded = upload(np.ascontiguousarray(of_group), self._device)
            for layer in group.layers:
                cache = self._caches[layer]
                assert cache is not None
                self._ops.copy_blocks(cache, uploaded)

    # Steps that are graphs

    def _replay(self, plan: StepPlan) -> Tensor | None:
        """Run the step as a graph, where it is of that kind and its graph is there."""
        if self._graphs is None or self._extend_graphs is None:
            return None
        if not self._ops.supports_graphs:  # a kernel has fallen back to what cannot be captured
            self._graphs = self._extend_graphs = None
            return None
        kind = self._draw_kind(plan.rows) if plan.samples.all() else None
        if kind is not None and plan.num_single == len(plan.rows):
            return self._graphs.run(plan, kind, has_adapters=self._has_adapters)
        self._graphs.forget_rows()
        if kind is not None and not self._prompts and self._extend_graphs.suits(plan):
            return self._extend_graphs.run(plan, kind, has_adapters=self._has_adapters)
        return None

    def _draw_kind(self, rows: Int32) -> DrawKind | None:
        """What the draws of rows have in common; None when a graph cannot hold them."""
        if self._kind is None or self._kind[0] is not rows:
            kind: DrawKind | None = None
            if self._sampler.is_plain(rows) and not self._pooler.mask(rows).any():
                kind = DrawKind.FILTERED if self._sampler.is_filtered(rows) else DrawKind.PLAIN
                kind = DrawKind.GREEDY if self._sampler.is_greedy(rows) else kind
            self._kind = (rows, kind)
        return self._kind[1]

    def _decode(
        self, token_ids: Tensor, batch: StepBatch, rows: Tensor, num_known: Tensor, kind: DrawKind
    ) -> tuple[Tensor, Tensor]:
        """What a graph holds: see `graphs.DecodeStep`."""
        self._ops.begin_step(batch)
        hidden = self._model.forward(token_ids, batch, self._caches)
        return self._draw_by_row(hidden, rows, num_known, kind)

    def _extend(self, step: DeviceBatch, kind: DrawKind) -> tuple[Tensor, Tensor]:
        """What a graph of an extension holds: see `graphs.ExtendStep`."""
        self._ops.begin_step(step.batch)
        hidden = self._model.forward(step.token_ids, step.batch, self._caches)
        return self._draw_by_row(hidden[step.last_token], step.rows, step.num_known, kind)

    def _draw_by_row(
        self, hidden: Tensor, rows: Tensor, num_known: Tensor, kind: DrawKind
    ) -> tuple[Tensor, Tensor]:
        logits = self._model.logits(hidden)
        drawn = self._sampler.draw_by_row(
            logits,
            rows,
            num_known,
            all_greedy=kind is DrawKind.GREEDY,
            any_filter=kind is DrawKind.FILTERED,
        )
        return drawn, logits

    # All other steps

    def _run(self, plan: StepPlan) -> PendingStep:
        drawing = self._pooler.drawing(plan)
        has = self._has_adapters
        step = to_device(plan, drawing, self._state, self.block_size, has_adapters=has)
        if self._pooler:
            step.batch.token_types = self._pooler.token_types(plan)
        self._ops.begin_step(step.batch)
        hidden = self._model.forward(step.token_ids, step.batch, self._caches)
        prompt_logprobs = self._prompt_logprobs(plan, hidden) if self._prompts else {}
        vectors = self._pooler.pool(plan, hidden) if self._pooler else None
        if len(drawing) == 0:
            empty = torch.empty(0, dtype=torch.int64, device=self._device)
            return self._pend(plan, drawing, empty, None, prompt_logprobs, vectors)
        drawn = self._draw(plan, step, hidden)
        return self._pend(plan, drawing, _marked(drawn), drawn.logprobs, prompt_logprobs, vectors)

    def _draw(self, plan: StepPlan, step: DeviceBatch, hidden: Tensor) -> Drawn:
        rows = plan.rows if len(step.drawing) == len(plan.rows) else plan.rows[step.drawing]
        if len(step.drawing) < len(hidden):
            hidden = hidden[step.last_token]
        drawn = self._sampler.draw(
            self._model.logits(hidden),
            rows,
            step.rows,
            step.num_known,
            self._state.tokens,
            step.batch.max_context_len,
        )
        self._state.tokens[step.rows, step.num_known] = drawn.tokens.int()
        return drawn

    def _prompt_logprobs(self, plan: StepPlan, hidden: Tensor) -> dict[int, list[TokenLogprobs]]:
        found: dict[int, list[TokenLogprobs]] = {}
        starts = np.cumsum(plan.num_scheduled) - plan.num_scheduled
        for i, row in enumerate(plan.rows.tolist()):
            prompt = self._prompts.get(row)
            if prompt is None:
                continue
            computed, start = int(plan.num_computed[i]), int(starts[i])
            count = min(int(plan.num_scheduled[i]), len(prompt) - 1 - computed)
            if count <= 0:
                continue
            k = self._sampler.wants_prompt_logprobs(row)
            assert k is not None
            following = upload(
                prompt[computed + 1 : computed + 1 + count].astype(np.int64), self._device
            )
            size = max(1, _MAX_SCORES // self.vocab_size)
            found[i] = []
            for part in range(0, count, size):
                end = min(part + size, count)
                logits = self._model.logits(hidden[start + part : start + end])
                found[i] += self._sampler.prompt_logprobs(logits, following[part:end], k)
        return found

    def _pend(
        self,
        plan: StepPlan,
        drawing: Int64,
        drawn: Tensor,
        logprobs: PendingLogprobs | None,
        prompt_logprobs: Mapping[int, list[TokenLogprobs]],
        vectors: PendingVectors | None = None,
    ) -> PendingStep:
        """Send what was drawn on its way to the host."""
        done = None
        if self.overlaps:
            buffer = self._results[self._num_launched % _NUM_RESULTS]
            self._num_launched += 1
            drawn = buffer[: len(drawn)].copy_(drawn, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return PendingStep(len(plan.rows), drawing, drawn, done, logprobs, prompt_logprobs, vectors)


def _marked(drawn: Drawn) -> Tensor:
    """Tokens [S], or -1 - token where the logits were not finite: one tensor to copy."""
    return torch.where(drawn.bad, -1 - drawn.tokens, drawn.tokens)
