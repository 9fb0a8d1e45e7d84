"""One request as the scheduler sees it: its state between its milestones."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedcore.request import Request


class Status(Enum):
    """Where a sequence is; it is in exactly one place (semantics SCHED-12)."""

    WAITING = auto()
    DEFERRED = auto()
    """A child of a fork that has not taken effect (FORK-2)."""
    RUNNING = auto()
    PREEMPTED = auto()
    """Waiting, to be computed again (PRE-1)."""
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class BlockContent:
    """All that a block's hash covers, for hashes that may collide: its own tokens and `extra`, and
    the content in front of it."""

    before: "BlockContent | None"
    tokens: bytes
    extra: tuple[Any, ...] | None

    def equals(self, other: "BlockContent | None") -> bool:
        """Compare up to where the two chains meet."""
        mine: BlockContent | None = self
        while mine is not other:
            if mine is None or other is None:
                return False
            if (mine.tokens, mine.extra) != (other.tokens, other.extra):
                return False
            mine, other = mine.before, other.before
        return True


@dataclass(slots=True, eq=False)
class SequenceState:
    """Created once per request; while it runs, what changes per token is in the table."""

    request: Request
    number: int
    """Order of arrival; children of a fork have their parent's."""

    seed: int
    """State of the draw, kept through preemption."""

    order: Any
    """The policy's answer."""

    end: int
    """Length at which it ends: by max_tokens, or by the longest sequence that is possible."""

    born: int
    """The table's `next_ticket` when it arrived: tickets below are of others."""

    status: Status = Status.WAITING
    row: int = -1
    """In the table, while RUNNING."""

    hashes: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were needed."""

    contents: list[BlockContent] = field(default_factory=list)
    """What the hashes stand for; empty when they cannot collide."""

    num_awaited: int = 0
    """Tokens still in flight when it was preempted: it is not resumed before (ASYNC-5)."""

    trusted_from: int = 0
    """What comes from stays in the table with smaller tickets builds on a step that failed."""

    was_admitted: bool = False
    """It has had a row before, so look-ups and cached tokens are not counted again (KV-12)."""

    is_child: bool = False
    """It began as a fork of another sequence."""

    parent: "SequenceState | None" = None
    """While DEFERRED: whose computation it waits for."""

    forks: list["PendingFork"] = field(default_factory=list)
    """Forks of this sequence that have not taken effect."""

    num_prompt_logprobs: int = 0
    """Prompt tokens whose log-probabilities were handed out."""

    def known_tokens(self) -> NDArray[np.int32]:
        """Prompt and outputs, int32; valid while it is not RUNNING."""
        request = self.request
        if not request.output_token_ids:
            return request.prompt_token_ids
        outputs = np.array(request.output_token_ids, np.int32)
        return np.concatenate([request.prompt_token_ids, outputs])

    def __lt__(self, other: "SequenceState") -> bool:
        """Order in the queue."""
        mine = (self.order, self.number, self.request.id)
        return bool(mine < (other.order, other.number, other.request.id))


@dataclass(slots=True, eq=False)
class PendingFork:
    """Children that wait until their parent has computed what they share."""

    num_computed: int
    """`c` of FORK-2: all tokens known at the call but the last."""

    children: list[SequenceState]
