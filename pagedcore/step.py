"""What bookkeeping and execution say to each other about one step: arrays, no tensors, no queues.

The scheduler writes a `StepPlan`, the executor answers with a `StepResult`. Letters:

    S sequences in the step    G cache groups    R rows    V vocabulary

A *row* is a stable index into the scheduler's table and into the executor's device state. A
sequence keeps its row while it runs; a row that is free is given to the next one that is admitted.
The executor runs steps in the order of their plans, so a row or a block may be given away as soon
as its last step has been *planned*: later steps cannot overtake earlier ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pagedcore.request import FinishReason, Request

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Admission:
    """A row that starts, or starts again: its device state is written before the step runs."""

    row: int
    request: Request
    """Prompt and sampling parameters; read-only to the executor."""

    token_ids: Int32
    """Every known token, prompt and outputs (after a preemption or a fork)."""

    seed: int
    """64-bit state of the draw: the request's own seed, or the engine's choice."""

    adapter_slot: int = -1
    """Where the request's adapter lies while the row runs; -1 is none."""


@dataclass(slots=True)
class StepPlan:
    """What one step runs. Sequences that run one token come first, in order of admission."""

    rows: Int32
    """[S] The same array object as in the last plan, when the rows are the same."""

    num_computed: Int32
    """[S] Positions whose keys and values are in the cache before the step."""

    num_scheduled: Int32
    """[S] Tokens that the step runs, at positions num_computed, num_computed + 1 ..."""

    samples: Bool
    """[S] Whether a token is drawn: the step reaches the last known (or awaited) token."""

    num_single: int
    """The first so many sequences run exactly one token."""

    admitted: list[Admission] = field(default_factory=list)
    """Rows that are new since the last plan."""

    table_updates: Int32 = field(default_factory=lambda: np.empty((0, 4), np.int32))
    """[N, 4] Block-table entries that changed: group, row, index in the table, block."""

    copies: Int32 = field(default_factory=lambda: np.empty((0, 4), np.int32))
    """[C, 4] Copies on write, done before any write of the step (FORK-6): group, source block,
    destination block, number of slots."""

    request_ids: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    """[S] Who held each row when the plan was made; the executor does not look at it."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the step."""
        return int(self.num_scheduled.sum())


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the token that stands there, then the most likely."""

    token_ids: Int32
    """[k + 1] or [k], when the first is among the k most likely (SAMPLE-9)."""

    logprobs: Float32
    """The same shape."""

    ranks: Int32
    """The same shape; 1 is the most likely."""


@dataclass(slots=True)
class StepResult:
    """What a step produced."""

    tokens: Int32
    """[S] The token drawn for each sequence; without meaning where the plan draws none."""

    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    """By index in the batch, for sequences that asked."""

    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By index in the batch: one entry for each prompt token the step ran, for the token that
    *follows* it in the prompt."""

    vectors: Mapping[int, Float32] = field(default_factory=dict)
    """By index in the batch: what those that draw got in place of a token, float32 [n]."""

    failed: Mapping[int, str] = field(default_factory=dict)
    """By index in the batch: sequences whose step failed (such as NaN logits), and why."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence that ended in this step."""

    request_id: int
    reason: FinishReason
    stop_reason: int | None = None
    """The stop token id that ended it, where one did (STOP-1)."""

    message: str | None = None
    """Why, when `reason` is ERROR."""


@dataclass(slots=True)
class StepOutput:
    """What a finished step tells the callers. K sequences got a token."""

    request_ids: Int64
    """[K]"""

    tokens: Int32
    """[K] One new token each; those dropped under ASYNC-3 are not here."""

    finished: list[Finished] = field(default_factory=list)
    """Sequences that are over; the token that ended them is in `tokens`."""

    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """By request id."""

    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By request id; pieces of one prompt arrive in order."""

    num_cached_tokens: dict[int, int] = field(default_factory=dict)
    """By request id: prompt tokens found in the cache, told once, with the first output."""

    queue_seconds: dict[int, float] = field(default_factory=dict)
    """By request id: from arrival to the first admission, told with `num_cached_tokens`."""

    vectors: dict[int, Float32] = field(default_factory=dict)
    """By request id: the one output of a request that wants a vector; it is in `finished`, too."""
