"""What a finished step means: tokens appended, sequences ended, failures contained.

    S sequences in the step

Sequences may have ended, been preempted or begun again since the step was planned: tickets tell.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pagedcore.request import FinishReason
from pagedcore.scheduling.in_flight import StepInFlight, ended_among, spread
from pagedcore.scheduling.prefix_cache import PrefixCache
from pagedcore.scheduling.roster import Roster
from pagedcore.scheduling.sequence import SequenceState
from pagedcore.scheduling.stopping import End, may_have_ended, why_ended
from pagedcore.scheduling.table import SequenceTable
from pagedcore.step import Bool, Finished, Int32, StepOutput, StepResult

Ending = tuple[SequenceState, End]
"""A sequence that is over, and why."""


class Collector:
    """Takes the results of steps, oldest first; `later` ones are still in flight."""

    def __init__(self, roster: Roster, table: SequenceTable, cache: PrefixCache) -> None:
        self._roster = roster
        self._table = table
        self._cache = cache
        self.num_tokens = 0
        """Tokens handed out."""

    def finish(
        self, step: StepInFlight, result: StepResult, later: Sequence[StepInFlight]
    ) -> StepOutput:
        """Hand out what a step produced."""
        finished = self._fail_some(step, result, later) if result.failed else []
        plan, ends = step.plan, list[Ending]()
        steady = self._table.steady
        if steady is not None and step.batch is steady.batch and step.draws_all:
            rows, tokens, produced = plan.rows, result.tokens, None  # all of them
            may_end = steady.append(tokens)
            output = StepOutput(plan.request_ids, tokens, finished)
        else:
            self._table.steady = None
            live = self._table.ticket[plan.rows] == step.batch.tickets
            produced = live & plan.samples
            rows, tokens = plan.rows[produced], result.tokens[produced]
            taken, ends = self._take_late(step, result.tokens, plan.samples & ~live)
            produced |= taken
            output = StepOutput(plan.request_ids[produced], result.tokens[produced], finished)
            self._append(rows, tokens)
            may_end = True
            if result.vectors:
                _give_vectors(step, result, produced, output)
        if may_end:
            ends += self._ends_of(rows, tokens)
        self.num_tokens += len(output.tokens)
        if self._roster.untold:
            self._tell_cached(output)
        if result.logprobs or result.prompt_logprobs:
            self._add_logprobs(step, result, produced, output)
        for sequence, end in ends:
            self._roster.end(sequence, end[0])
            finished.append(Finished(sequence.request.id, *end))
        return output

    def fail(self, step: StepInFlight, message: str, later: Sequence[StepInFlight]) -> StepOutput:
        """End everybody who was in a step that failed as a whole."""
        guilty: dict[SequenceState, str] = {}
        for index, draws in enumerate(step.plan.samples.tolist()):
            sequence = self._sequence(step, index)
            if sequence is not None and self._is_trusted(step, index, sequence):
                guilty[sequence] = message
            elif sequence is not None and draws:
                sequence.num_awaited -= 1
        # Rows that began without running anything: the device may not have heard of them.
        begun = (self._roster.find(admission.request.id) for admission in step.plan.admitted)
        doubtful = [sequence for sequence in begun if sequence is not None]
        gone = ended_among([step, *later], set(step.plan.request_ids.tolist()))
        finished = self._end_guilty([step, *later], guilty, gone, doubtful)
        return StepOutput(np.empty(0, np.int64), np.empty(0, np.int32), finished)

    # Tokens

    def _append(self, rows: Int32, tokens: Int32) -> None:
        table = self._table
        known = table.num_known[rows]
        table.tokens[rows, known] = tokens
        table.num_known[rows] = known + 1

    def _ends_of(self, rows: Int32, tokens: Int32) -> list[Ending]:
        """The sequences whose newest token is their last."""
        table = self._table
        due = may_have_ended(table, rows, tokens)
        ends: list[Ending] = []
        if not due.any():
            return ends
        for row in rows[due].tolist():
            sequence = table.sequence(row)
            end = why_ended(sequence.request, table.outputs(row), sequence.end)
            if end is not None:
                ends.append((sequence, end))
        return ends

    def _take_late(
        self, step: StepInFlight, tokens: Int32, late: Bool
    ) -> tuple[Bool, list[Ending]]:
        """Take tokens of sequences that were preempted meanwhile (ASYNC-5): which were taken, and
        what they end.
        """
        taken = np.zeros_like(late)
        ends: list[Ending] = []
        for index in np.flatnonzero(late).tolist():
            sequence = self._sequence(step, index)
            if sequence is None or sequence.num_awaited == 0:
                continue  # aborted, or ended by the step before (ASYNC-3)
            sequence.num_awaited -= 1
            if not self._is_trusted(step, index, sequence):
                continue
            taken[index] = True
            request = sequence.request
            request.output_token_ids.append(int(tokens[index]))
            end = why_ended(request, np.array(request.output_token_ids, np.int32), sequence.end)
            if end is not None:
                ends.append((sequence, end))
        return taken, ends

    def _sequence(self, step: StepInFlight, index: int) -> SequenceState | None:
        request_id, ticket = int(step.plan.request_ids[index]), int(step.batch.tickets[index])
        return self._roster.of_ticket(request_id, ticket)

    def _is_trusted(self, step: StepInFlight, index: int, sequence: SequenceState) -> bool:
        """Whether what the step did for a sequence builds on nothing that failed."""
        return int(step.batch.tickets[index]) >= sequence.trusted_from

    # What goes with tokens

    def _tell_cached(self, output: StepOutput) -> None:
        untold = self._roster.untold
        told = [sequence for sequence in untold if self._roster.num_outputs(sequence) > 0]
        for sequence in told:
            untold.remove(sequence)
            request = sequence.request
            output.num_cached_tokens[request.id] = request.num_cached_tokens
            waited = request.first_scheduled_time - request.arrival_time
            output.queue_seconds[request.id] = max(0.0, waited)

    def _add_logprobs(
        self, step: StepInFlight, result: StepResult, produced: Bool | None, output: StepOutput
    ) -> None:
        plan = step.plan
        for index, entry in result.logprobs.items():
            if produced is None or produced[index]:
                output.logprobs[int(plan.request_ids[index])] = entry
        for index, entries in result.prompt_logprobs.items():
            sequence = self._sequence(step, index)
            if sequence is None or sequence.is_child:
                continue
            if not self._is_trusted(step, index, sequence):
                continue
            fresh = entries[sequence.num_prompt_logprobs - int(plan.num_computed[index]) :]
            if fresh:
                sequence.num_prompt_logprobs += len(fresh)
                output.prompt_logprobs[sequence.request.id] = fresh

    # Failures

    def _fail_some(
        self, step: StepInFlight, result: StepResult, later: Sequence[StepInFlight]
    ) -> list[Finished]:
        """End the sequences that failed, but not those that only built on them."""
        failed: dict[SequenceState, str] = {}
        for index, message in result.failed.items():
            sequence = self._sequence(step, index)
            if sequence is not None and self._is_trusted(step, index, sequence):
                failed[sequence] = message
        ids = set(step.plan.request_ids[list(result.failed)].tolist())
        gone = ended_among([step, *later], ids)
        built_on = spread([step], gone.union(failed)).built_on
        guilty = {s: message for s, message in failed.items() if s not in built_on}
        return self._end_guilty([step, *later], guilty, gone, built_on)

    def _end_guilty(
        self,
        steps: Sequence[StepInFlight],
        guilty: Mapping[SequenceState, str],
        gone: set[SequenceState],
        doubtful: Iterable[SequenceState],
    ) -> list[Finished]:
        """End who is guilty, and let everybody begin again who built on them or on `gone`."""
        damage = spread(steps, gone.union(guilty))
        self._cache.forget(damage.entries)  # before any block is freed or looked up (KV-11)
        finished = []
        for sequence, message in guilty.items():
            self._roster.end(sequence, FinishReason.ERROR)
            finished.append(Finished(sequence.request.id, FinishReason.ERROR, message=message))
        for sequence in damage.built_on.union(doubtful):
            if self._roster.find(sequence.request.id) is sequence:
                self._roster.recompute(sequence)
        return finished


def _give_vectors(
    step: StepInFlight, result: StepResult, produced: Bool, output: StepOutput
) -> None:
    """Let sequences that wanted a vector have that, and no token."""
    ids = step.plan.request_ids
    drawn = produced.copy()
    for index, vector in result.vectors.items():
        if produced[index]:
            output.vectors[int(ids[index])] = vector
            drawn[index] = False
    output.request_ids, output.tokens = ids[drawn], result.tokens[drawn]
