"""Steps that are planned and have no result yet, and what a failure among them touches."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pagedcore.scheduling.prefix_cache import BlockLog
from pagedcore.scheduling.sequence import SequenceState, Status
from pagedcore.scheduling.table import Batch
from pagedcore.step import StepPlan


@dataclass(slots=True, eq=False)
class StepInFlight:
    """A plan, and what the scheduler must remember of it."""

    plan: StepPlan

    batch: Batch
    """Who was in it; the table's version tells whether everybody is still there."""

    draws_all: bool
    """Whether every sequence of the plan draws a token."""

    log: BlockLog
    """What this step entered into the prefix cache and found there."""

    forked: list[tuple[SequenceState, SequenceState]]
    """Children that joined at the beginning of this step, each with its parent."""


@dataclass(slots=True)
class Damage:
    """What a failure has spread to."""

    built_on: set[SequenceState]
    """Sequences, guilty or not, that read what a guilty one wrote."""

    entries: list[tuple[int, bytes]]
    """Entries of the prefix cache that must go: block and key."""


def spread(steps: Iterable[StepInFlight], guilty: Collection[SequenceState]) -> Damage:
    """Follow what `guilty` wrote in the first of `steps` and after it."""
    doubtful = set(guilty)
    damage = Damage(set(), [])
    bad_blocks: set[int] = set()

    def mark(sequence: SequenceState) -> None:
        doubtful.add(sequence)
        damage.built_on.add(sequence)

    for number, step in enumerate(steps):
        for child, parent in step.forked:
            # those that joined before the first step share what was there before
            if number > 0 and parent in doubtful:
                mark(child)
        for sequence, block, key in step.log:
            if key is None:
                if block in bad_blocks:
                    mark(sequence)
            elif sequence in doubtful:
                bad_blocks.add(block)
                damage.entries.append((block, key))
            else:
                bad_blocks.discard(block)
    return damage


def ended_among(steps: Iterable[StepInFlight], ids: Collection[int]) -> set[SequenceState]:
    """Sequences with these request ids that are over, and have left something behind in `steps`."""
    seen: set[SequenceState] = set()
    for step in steps:
        seen.update(parent for _, parent in step.forked)
        seen.update(sequence for sequence, _, _ in step.log)
    return {s for s in seen if s.status is Status.FINISHED and s.request.id in ids}
