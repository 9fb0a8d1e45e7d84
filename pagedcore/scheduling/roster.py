"""All live sequences, and where each of them is: waiting, deferred, or in a row of the table."""

import random
from collections.abc import Callable, Iterable, Sequence

from pagedcore.errors import RequestError
from pagedcore.metrics import PREEMPTIONS, Buckets
from pagedcore.request import FinishReason, Request
from pagedcore.scheduling.adapters import AdapterSlots
from pagedcore.scheduling.paging import Pager
from pagedcore.scheduling.policies import Policy
from pagedcore.scheduling.prefix_cache import Prefix, PrefixCache
from pagedcore.scheduling.queue import WaitingQueue
from pagedcore.scheduling.sequence import PendingFork, SequenceState, Status
from pagedcore.scheduling.table import SequenceTable
from pagedcore.step import Int32


class Roster:
    """Moves sequences from place to place; each is in exactly one (semantics SCHED-12)."""

    def __init__(
        self,
        table: SequenceTable,
        pager: Pager,
        cache: PrefixCache,
        policy: Policy,
        *,
        longest: int,
        seed: int,
        num_adapter_slots: int = 0,
    ) -> None:
        """`longest` is the length at which every sequence ends at the latest."""
        self.adapters = AdapterSlots(num_adapter_slots)
        self.table = table
        self.pager = pager
        self.cache = cache
        self.policy = policy
        self._tell_ended: Callable[[Request], None] | None = getattr(policy, "ended", None)
        self.longest = longest
        self.queue = WaitingQueue()
        self.untold: set[SequenceState] = set()
        """Admitted, and nobody has heard yet how much of their prompts was cached."""
        self.num_deferred = 0
        """Children whose fork has not taken effect."""
        self.num_preemptions = 0
        self.num_forked = 0
        """Children of forks so far."""
        self.num_ended = dict.fromkeys(FinishReason, 0)
        self.preemptions = Buckets(PREEMPTIONS)
        """Sequences that are over, by reason."""
        self.ended: list[tuple[Request, FinishReason]] | None = None
        """Who is over since somebody looked; None while nobody does."""
        self._live: dict[int, SequenceState] = {}
        self._parents: dict[SequenceState, None] = {}  # in order of their forks
        self.next_number = 0
        self._random = random.Random(seed)

    def __len__(self) -> int:
        return len(self._live)

    def find(self, request_id: int) -> SequenceState | None:
        """The live sequence with this id."""
        return self._live.get(request_id)

    def of_ticket(self, request_id: int, ticket: int) -> SequenceState | None:
        """Who had this ticket, unless it is over (and its id perhaps in use again)."""
        sequence = self._live.get(request_id)
        return sequence if sequence is not None and ticket >= sequence.born else None

    def adapter_keys(self) -> set[str]:
        """Of all live sequences, wherever they are."""
        return {sequence.request.adapter_key for sequence in self._live.values()} - {""}

    def num_outputs(self, sequence: SequenceState) -> int:
        """Outputs that are known."""
        if sequence.status is Status.RUNNING:
            row = sequence.row
            return int(self.table.num_known[row] - self.table.num_prompt[row])
        return len(sequence.request.output_token_ids)

    def outputs(self, sequence: SequenceState) -> list[int]:
        """The outputs that are known, in a list of their own."""
        if sequence.status is Status.RUNNING:
            return self.table.outputs(sequence.row).tolist()  # type: ignore[no-any-return]
        return list(sequence.request.output_token_ids)

    # Arrival

    def add(self, request: Request) -> SequenceState:
        """Let a request wait."""
        sequence = self._new(request, self.next_number)
        self.next_number += 1
        self.queue.push(sequence)
        return sequence

    def defer(self, parent: SequenceState, requests: Sequence[Request], num_computed: int) -> None:
        """Let children wait until `parent` has computed what they share (FORK-2)."""
        children = [self._new(request, parent.number) for request in requests]
        for child in children:
            child.is_child, child.parent, child.status = True, parent, Status.DEFERRED
        parent.forks.append(PendingFork(num_computed, children))
        self._parents[parent] = None
        self.num_deferred += len(children)
        self.num_forked += len(children)

    def _new(self, request: Request, number: int) -> SequenceState:
        most = request.params.max_tokens
        length = len(request.prompt_token_ids)
        longest = self.longest
        if request.pooling is not None:  # its vector takes the place of a token, and no block
            most, longest = 1, length + 1
        seed = request.params.seed
        sequence = SequenceState(
            request=request,
            number=number,
            seed=self._random.getrandbits(63) if seed is None else seed,
            order=self.policy.order(request),
            end=longest if most is None else min(length + most, longest),
            born=self.table.next_ticket,
        )
        self._live[request.id] = sequence
        return sequence

    # In and out of the table

    def join(self, sequence: SequenceState, tokens: Int32, prefix: Prefix) -> int:
        """Give the first of the queue a row, and the cached blocks that it begins with."""
        popped = self.queue.pop()
        assert popped is sequence
        row = self._seat(sequence, tokens)
        self.pager.adopt(row, prefix)
        self.cache.note_found(sequence, prefix)
        return row

    def _seat(self, sequence: SequenceState, tokens: Int32) -> int:
        sequence.status = Status.RUNNING
        sequence.was_admitted = True
        self.adapters.take(sequence.request.adapter_key)
        return self.table.add(sequence, tokens, sequence.end)

    def preempt(self, row: int) -> SequenceState:
        """Take a row's blocks away and let its sequence wait again (PRE-1)."""
        self.cache.enter_settled(row)
        sequence = self._requeue(row)
        sequence.request.num_preemptions += 1
        self.num_preemptions += 1
        return sequence

    def recompute(self, sequence: SequenceState) -> None:
        """Begin again: what a sequence has computed builds on a step that failed."""
        if sequence.status is Status.RUNNING:
            self._requeue(sequence.row)
        sequence.trusted_from = self.table.next_ticket

    def _requeue(self, row: int) -> SequenceState:
        table = self.table
        awaited = int(table.length[row] - table.num_known[row])
        self.pager.free(row)
        sequence = table.remove(row)
        self.adapters.release(sequence.request.adapter_key)
        sequence.status, sequence.num_awaited = Status.PREEMPTED, awaited
        sequence.order = self.policy.order(sequence.request)
        self.queue.push(sequence)
        return sequence

    # Forks

    def join_forks(self) -> list[tuple[SequenceState, SequenceState]]:
        """Let forks take effect whose parents have come far enough: children with a row, each
        with its parent (FORK-3, FORK-8).
        """
        joined: list[tuple[SequenceState, SequenceState]] = []
        for parent in list(self._parents):  # a child that is a parent comes after its own
            if parent.status is not Status.RUNNING:
                continue
            computed = self.table.num_computed[parent.row]
            ready = [fork for fork in parent.forks if computed >= fork.num_computed]
            for fork in ready:
                parent.forks.remove(fork)
                self.num_deferred -= len(fork.children)
                for child in fork.children:
                    child.parent = None
                    if self._split(parent, child, fork.num_computed):
                        joined.append((child, parent))
            if not parent.forks:
                del self._parents[parent]
        return joined

    def _split(self, parent: SequenceState, child: SequenceState, num_computed: int) -> bool:
        """Share blocks with a child; without a row for it, it is an ordinary waiting one."""
        if self.table.num_free_rows == 0 or not self.pager.can_share(parent.row, num_computed):
            self._enqueue(child)
            return False
        row = self._seat(child, child.known_tokens())
        self.pager.share(parent.row, row, num_computed)
        return True

    def _enqueue(self, child: SequenceState) -> None:
        child.status, child.parent = Status.WAITING, None
        self.queue.push(child)

    # The end

    def end(self, sequence: SequenceState, reason: FinishReason) -> None:
        """Let go of a sequence, wherever it is (CANCEL-1)."""
        if sequence.status is Status.RUNNING:
            if reason is not FinishReason.ERROR:
                self.cache.enter_settled(sequence.row)
            self.pager.free(sequence.row)
            self.table.remove(sequence.row)
            self.adapters.release(sequence.request.adapter_key)
        elif sequence.status is Status.DEFERRED:
            self._leave_parent(sequence)
        else:
            self.queue.remove(sequence)
        sequence.status = Status.FINISHED
        self.untold.discard(sequence)
        self.num_ended[reason] += 1
        if self.ended is not None:
            self.ended.append((sequence.request, reason))
        self.preemptions.observe(sequence.request.num_preemptions)
        del self._live[sequence.request.id]
        if self._tell_ended is not None:
            self._tell_ended(sequence.request)
        if sequence in self._parents:  # FORK-10
            del self._parents[sequence]
            for fork in sequence.forks:
                self.num_deferred -= len(fork.children)
                for child in fork.children:
                    self._enqueue(child)
            sequence.forks.clear()

    def _leave_parent(self, child: SequenceState) -> None:
        parent = child.parent
        assert parent is not None
        self.num_deferred -= 1
        for fork in parent.forks:
            if child in fork.children:
                fork.children.remove(child)
                if not fork.children:
                    parent.forks.remove(fork)
                break
        if not parent.forks:
            del self._parents[parent]
        child.parent = None


def check_children(num_outputs: int, children: Iterable[Request]) -> None:
    """Raise RequestError for a child that could not go on from so many outputs."""
    for child in children:
        most = child.params.max_tokens
        if most is not None and most <= num_outputs:
            raise RequestError(
                f"max_tokens must be more than the {num_outputs} outputs that the fork begins "
                f"with, not {most}",
                "max_tokens",
            )
