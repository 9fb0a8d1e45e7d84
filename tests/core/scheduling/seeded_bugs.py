"""Bugs that the tests of the scheduler must notice: each a deterministic change of a few lines."""

from dataclasses import dataclass
from textwrap import dedent


@dataclass(frozen=True)
class Mutant:
    """Replace `old` by `new`, in a module of `pagedcore.scheduling`.

    `old` is part of a line that stands once, or several whole lines whatever their indentation.
    """

    name: str
    module: str
    old: str
    new: str

    def apply(self, source: str) -> str:
        """The module's source with the bug in it; ValueError unless it has one place for it."""
        if "\n" not in self.old:
            if source.count(self.old) != 1:
                raise ValueError(f"{self.name!r}: {source.count(self.old)} places")
            return source.replace(self.old, self.new)
        lines = source.splitlines()
        old = [line.strip() for line in dedent(self.old).strip().splitlines()]
        stripped = [line.strip() for line in lines]
        places = [i for i in range(len(lines)) if stripped[i : i + len(old)] == old]
        if len(places) != 1:
            raise ValueError(f"{self.name!r}: {len(places)} places")
        [place] = places
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        new = [indent + line for line in dedent(self.new).strip("\n").splitlines()]
        return "\n".join([*lines[:place], *new, *lines[place + len(old) :], ""])


POOL = [
    Mutant(
        "stale hash kept on reuse",
        "blocks",
        """
        if self.key_of[block] is not None:
            self.forget(block)
        """,
        "",
    ),
    Mutant(
        "hit not pinned",
        "blocks",
        """
        if self.refs[block] == 0:
            before, after = self._previous[block], self._next[block]
        """,
        """
        if self.refs[block] == 0:
            continue
            before, after = self._previous[block], self._next[block]
        """,
    ),
    Mutant(
        "a hit block stays in the free list",
        "blocks",
        "self._next[before], self._previous[after] = after, before",
        "pass",
    ),
    Mutant(
        "LRU reversed: cached blocks go first",
        "blocks",
        "0 if self.key_of[block] is None else self._previous[0]",
        "self._previous[0] if self.key_of[block] is None else 0",
    ),
    Mutant(
        "every freed block goes to the tail",
        "blocks",
        "0 if self.key_of[block] is None else self._previous[0]",
        "self._previous[0]",
    ),
    Mutant(
        "null block counted and freed",
        "blocks",
        """
        if block == NULL_BLOCK:
            continue
        if self.refs[block] == 0:
        """,
        "if self.refs[block] == 0:",
    ),
    Mutant("free blocks miscounted on a hit", "blocks", "self.num_free -= 1", "pass"),
    Mutant(
        "evicting a block forgets its equal",
        "blocks",
        """
        if others:
            self._first[key] = others.pop(0)
        else:
            del self._first[key]
        """,
        "del self._first[key]",
    ),
    Mutant(
        "reset while blocks are in use",
        "blocks",
        "if self.num_free != self.num_blocks - 1:",
        "if False:",
    ),
]

TABLES = [
    Mutant(
        "double free",
        "paging",
        "self._release(self._blocks_of(group, row))",
        "self._release(self._blocks_of(group, row) + self._blocks_of(group, row)[:1])",
    ),
    Mutant(
        "free forgets one block",
        "paging",
        "self._release(self._blocks_of(group, row))",
        "self._release(self._blocks_of(group, row)[1:])",
    ),
    Mutant(
        "blocks are freed front first",
        "paging",
        "self._pool.release(reversed(blocks))",
        "self._pool.release(blocks)",
    ),
    Mutant(
        "ref not raised on share",
        "paging",
        """
        self._pool.touch(blocks)
        self._write(group, child, 0, blocks)
        """,
        "self._write(group, child, 0, blocks)",
    ),
    Mutant(
        "copy on write skipped",
        "paging",
        "table.is_forked[parent] = table.is_forked[child] = True",
        "pass",
    ),
    Mutant(
        "a parent writes into what it shares",
        "paging",
        "table.is_forked[parent] = table.is_forked[child] = True",
        "table.is_forked[child] = True",
    ),
    Mutant(
        "a copy is one slot short",
        "paging",
        "append((group, block, fresh, offset))",
        "append((group, block, fresh, max(0, offset - 1)))",
    ),
    Mutant(
        "a cached tail is written in place",
        "paging",
        "is_owned = pool.refs[block] == 1 and pool.key_of[block] is None",
        "is_owned = pool.refs[block] == 1",
    ),
    Mutant(
        "a copied block keeps its old reference",
        "paging",
        """
        if pool.refs[block] > 1:
            pool.release([block])
        else:  # nothing may overwrite it before the copies of this step are made
        """,
        "if pool.refs[block] <= 1:",
    ),
    Mutant(
        "a victim's copy is still done",
        "paging",
        "withdrawn = self._copies.pop(row, [])",
        "withdrawn = self._copies.get(row, [])",
    ),
    Mutant(
        "failed allocation keeps what it took",
        "paging",
        """
        if total + self._num_copies(forked) > pool.num_free:
            return False
        """,
        """
        if total + self._num_copies(forked) > pool.num_free:
            pool.take(pool.num_free)
            return False
        """,
    ),
    Mutant(
        "a copy's block is not counted",
        "paging",
        "if total + self._num_copies(forked) > pool.num_free:",
        "if total > pool.num_free:",
    ),
    Mutant(
        "a window gives back one block too many",
        "paging",
        "behind = (table.num_computed[rows] - window + 1) // self._block_size",
        "behind = (table.num_computed[rows] - window + 1) // self._block_size + 1",
    ),
    Mutant(
        "a window gives blocks back again",
        "paging",
        "table.num_slid[group, row] = end",
        "table.num_slid[group, row] = start",
    ),
    Mutant(
        "a fork shares what a window left behind",
        "paging",
        "if self._table.num_slid[group, parent] > first:",
        "if False:",
    ),
    Mutant(
        "one slot too few is reserved",
        "paging",
        "written = table.num_computed[rows] + counts",
        "written = np.maximum(table.num_computed[rows] + counts - 1, 1)",
    ),
    Mutant(
        "an entry is updated in the wrong order",
        "paging",
        "updates = updates[len(updates) - 1 - np.sort(last)]",
        "updates = updates[np.sort(last)]",
    ),
    Mutant(
        "preemption keeps num_computed_tokens",
        "paging",
        "table.num_computed[row] = length * self._block_size",
        "table.num_computed[row] += length * self._block_size",
    ),
    Mutant(
        "entered blocks are counted from the last owner on",
        "paging",
        "table.num_hashed[row] = length",
        "pass",
    ),
]

PREFIXES = [
    Mutant(
        "hit covers the last token",
        "prefix_cache",
        "limit = (len(tokens) - 1) // self._block_size",
        "limit = len(tokens) // self._block_size",
    ),
    Mutant(
        "salt left out of the chain",
        "prefix_cache",
        "salt = () if request.cache_salt is None else (request.cache_salt,)",
        "salt = ()",
    ),
    Mutant(
        "parent left out of the chain",
        "prefix_cache",
        "hashes.append(self._hasher.hash(parent, block, extra))",
        "hashes.append(self._hasher.hash(self._hasher.first_parent, block, extra))",
    ),
    Mutant("collision not compared", "prefix_cache", "if not stored.equals(own):", "if False:"),
    Mutant(
        "tail block shared: a block with unwritten slots is found",
        "planner",
        "self._cache.enter(rows, np.minimum(table.num_computed[rows], table.num_known[rows]))",
        "self._cache.enter(rows, table.num_known[rows])",
    ),
    Mutant(
        "a window's hit has holes",
        "prefix_cache",
        """
        run = []
        continue
        """,
        "continue",
    ),
    Mutant(
        "groups do not agree on a prefix",
        "prefix_cache",
        """
        if all(len(blocks) == shortest for blocks in found):
            return found
        """,
        "return [blocks[:shortest] for blocks in found]",
    ),
    Mutant(
        "a failed step's entries stay",
        "prefix_cache",
        "if self._pool.key_of[block] == key:",
        "if False:",
    ),
    Mutant(
        "prompts that are scored read the cache",
        "prefix_cache",
        "not scores and not params",
        "not params",
    ),
]

PLANS = [
    Mutant(
        "budget off by one",
        "planner",
        "draft = _Draft(self._budget, rows, counts, admitted=joined)",
        "draft = _Draft(self._budget + 1, rows, counts, admitted=joined)",
    ),
    Mutant(
        "one sequence too few can run",
        "table",
        "self._free = list(range(num_rows - 1, -1, -1))",
        "self._free = list(range(num_rows - 1, 0, -1))",
    ),
    Mutant(
        "admission ignores that hits use up free blocks",
        "planner",
        "free = self._pool.num_free - pager.num_unused(prefix)",
        "free = self._pool.num_free",
    ),
    Mutant(
        "admission in a step that preempted",
        "planner",
        "if not draft.preempted:  # SCHED-4",
        "if True:",
    ),
    Mutant(
        "a victim stays in the step",
        "planner",
        "draft.budget += granted.pop(victim, 0)",
        "draft.budget += granted.get(victim, 0)",
    ),
    Mutant(
        "a token is drawn in the middle of a prompt",
        "planner",
        "samples: Bool = computed == table.length[batch.rows]",
        "samples: Bool = computed <= table.length[batch.rows]",
    ),
    Mutant(
        "a sequence runs past its end",
        "planner",
        "np.where(length < table.end[rows], length - table.num_computed[rows], 0)",
        "length - table.num_computed[rows]",
    ),
    Mutant(
        "resumed before its tokens have drained",
        "planner",
        "if sequence.num_awaited > 0:  # ASYNC-5",
        "if False:",
    ),
    Mutant(
        "deadlock on an oversized head",
        "scheduler",
        "if length + num_outputs > self._longest:",
        "if length >= self._max_model_len:",
    ),
    Mutant(
        "who is not ready blocks the queue",
        "planner",
        """
        queue.pop()
        not_ready.append(sequence)
        continue
        """,
        "break",
    ),
    Mutant(
        "who is not ready is lost",
        "planner",
        "queue.put_back(not_ready)",
        "pass",
    ),
    Mutant("the oldest is the victim", "policies", "return len(running) - 1", "return 0"),
    Mutant(
        "the best priority is the victim",
        "policies",
        "return max(ranks)[2]",
        "return min(ranks)[2]",
    ),
]

MOVES = [
    Mutant(
        "victim not re-queued",
        "roster",
        """
        sequence.order = self.policy.order(sequence.request)
        self.queue.push(sequence)
        """,
        "sequence.order = self.policy.order(sequence.request)",
    ),
    Mutant(
        "abort in flight frees twice",
        "roster",
        """
        self.pager.free(sequence.row)
        self.table.remove(sequence.row)
        """,
        """
        self.pager.free(sequence.row)
        if self.table.length[sequence.row] > self.table.num_known[sequence.row]:
            self.pager.free(sequence.row)
        self.table.remove(sequence.row)
        """,
    ),
    Mutant(
        "abort while waiting leaves it in the queue",
        "roster",
        "self.queue.remove(sequence)",
        "pass",
    ),
    Mutant(
        "abort leaves a deferred child behind",
        "roster",
        "fork.children.remove(child)",
        "pass",
    ),
    Mutant(
        "children of an ended parent are lost",
        "roster",
        """
        for child in fork.children:
            self._enqueue(child)
        """,
        "pass",
    ),
    Mutant(
        "children admitted in part",
        "scheduler",
        "self._roster.defer(sequence, forks, len(request.prompt_token_ids) - 1)",
        "self._roster.defer(sequence, forks[:2], len(request.prompt_token_ids) - 1)",
    ),
    Mutant(
        "a fork takes effect a token too early",
        "roster",
        "if computed >= fork.num_computed]",
        "if computed >= fork.num_computed - 1]",
    ),
    Mutant(
        "a child has nothing left to compute",
        "scheduler",
        "self._roster.defer(parent, children, length - 1)",
        "self._roster.defer(parent, children, length)",
    ),
    Mutant(
        "a metric not lowered",
        "roster",
        """
        self.num_deferred -= len(fork.children)
        for child in fork.children:
            child.parent = None
        """,
        """
        for child in fork.children:
            child.parent = None
        """,
    ),
]

RESULTS = [
    Mutant(
        "late result applied to who has the row now",
        "collector",
        "live = self._table.ticket[plan.rows] == step.batch.tickets",
        "live = self._table.request_id[plan.rows] >= 0",
    ),
    Mutant(
        "late tokens of the preempted are dropped",
        "collector",
        "taken[index] = True",
        "continue",
    ),
    Mutant(
        "late tokens end nothing",
        "collector",
        "end = why_ended(request, np.array(request.output_token_ids, np.int32), sequence.end)",
        "end = None",
    ),
    Mutant(
        "finish told twice",
        "collector",
        "finished.append(Finished(sequence.request.id, *end))",
        "finished += [Finished(sequence.request.id, *end)] * 2",
    ),
    Mutant(
        "what built on a failure goes on",
        "collector",
        "for sequence in damage.built_on.union(doubtful):",
        "for sequence in doubtful:",
    ),
    Mutant(
        "a failure ends those who built on it",
        "collector",
        "guilty = {s: message for s, message in failed.items() if s not in built_on}",
        "guilty = failed",
    ),
    Mutant(
        "tokens that build on a failure are delivered",
        "collector",
        """
        if not self._is_trusted(step, index, sequence):
            continue
        taken[index] = True
        """,
        "taken[index] = True",
    ),
    Mutant(
        "an aborted culprit's entries stay",
        "collector",
        "damage = spread(steps, gone.union(guilty))",
        "damage = spread(steps, guilty.keys())",
    ),
    Mutant(
        "EOS comes after max_tokens",
        "stopping",
        "if token == request.eos_token_id and not params.ignore_eos:",
        "if token == request.eos_token_id and len(request.prompt_token_ids) + len(outputs) < end:",
    ),
    Mutant(
        "a ninth stop id is not seen",
        "table",
        "many = len(params.stop_token_ids) > NUM_STOP_IDS",
        "many = False",
    ),
    Mutant(
        "a repetition counts once too often",
        "stopping",
        "length = size * detection.min_count",
        "length = size * (detection.min_count + 1)",
    ),
]

STEADY = [
    Mutant(
        "the steady state outlives an admission",
        "table",
        """
        self.version += 1
        self.steady = None
        """,
        "self.version += 1",
    ),
    Mutant(
        "the steady state looks for blocks a step late",
        "steady",
        "return self._growing[-self._num_planned % len(self._growing)]",
        "return self._growing[(1 - self._num_planned) % len(self._growing)]",
    ),
    Mutant(
        "the steady state enters blocks a step early",
        "steady",
        "steps = range(self._num_entered + 1, self._num_finished + 1)",
        "steps = range(self._num_entered + 2, self._num_finished + 2)",
    ),
    Mutant(
        "the steady state does not see the end come",
        "steady",
        "self._num_until_end -= 1",
        "pass",
    ),
    Mutant("the steady state plans past the end", "steady", "self.num_left -= 1", "pass"),
    Mutant(
        "the steady state sees no stop ids",
        "steady",
        "self._ending = np.concatenate((table.eos[rows][None], stop_ids))",
        "self._ending = table.eos[rows][None]",
    ),
]

MUTANTS = [*POOL, *TABLES, *PREFIXES, *PLANS, *MOVES, *RESULTS, *STEADY]
