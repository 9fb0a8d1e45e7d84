"""A small scheduler, and a hand that moves it."""

from collections import deque

import numpy as np
import pytest

from pagedcore.cache_spec import CacheGroup, CacheSpec
from pagedcore.config import SchedulerConfig
from pagedcore.request import Request, SamplingParams
from pagedcore.scheduling.policies import FirstComeFirstServed, Priority
from pagedcore.scheduling.scheduler import Scheduler
from pagedcore.step import StepResult


class Rig:
    """Requests are known by their ids, which count from 1; `tokens` stand in for a model."""

    def __init__(
        self,
        *,
        num_blocks=5,
        block_size=2,
        max_num_seqs=4,
        budget=8,
        max_model_len=64,
        windows=(None,),
        caching=True,
        algorithm="sha256",
        watermark=0.0,
        priorities=False,
        policy=None,
        **limits,
    ):
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, **limits),
            num_blocks=num_blocks,
            block_size=block_size,
            groups=[
                CacheGroup(CacheSpec(num_kv_heads=1, head_dim=1, window=window), (layer,))
                for layer, window in enumerate(windows)
            ],
            max_model_len=max_model_len,
            enable_prefix_caching=caching,
            hash_algorithm=algorithm,
            kv_watermark=watermark,
            policy=policy or (Priority() if priorities else FirstComeFirstServed()),
            seed=0,
        )
        self.pool = self.scheduler._pool
        self.table = self.scheduler._table
        self.num_requests = 0
        self.in_flight = deque()

    def request(self, prompt, *, eos=-1, salt=None, priority=0, arrival=None, owner="", **params):
        self.num_requests += 1
        params.setdefault("max_tokens", 16)
        return Request(
            id=self.num_requests,
            prompt_token_ids=np.array(prompt, np.int32),
            params=SamplingParams(**params),
            eos_token_id=eos,
            cache_salt=salt,
            owner=owner,
            priority=priority,
            arrival_time=self.num_requests if arrival is None else arrival,
        )

    def add(self, prompt, *, choices=1, **options):
        """Add a request; its id, those of its other choices are the next."""
        request = self.request(prompt, **options)
        forks = [self.request(prompt, **options) for _ in range(choices - 1)]
        self.scheduler.add(request, forks)
        return request.id

    def fork(self, parent, count=1, **options):
        children = [self.request([0], **options) for _ in range(count)]
        self.scheduler.fork(parent, children)
        return [child.id for child in children]

    def plan(self):
        """Plan a step: {id: tokens that it runs}, in the order of the batch; {} is no step."""
        plan = self.scheduler.plan_step()
        if plan is None:
            return {}
        self.in_flight.append(plan)
        return dict(zip(plan.request_ids.tolist(), plan.num_scheduled.tolist(), strict=True))

    def finish(self, tokens=7, **details):
        """Finish the oldest step; `tokens` is one for all, or one for each id."""
        plan = self.in_flight.popleft()
        drawn = [
            tokens.get(i, 7) if isinstance(tokens, dict) else tokens
            for i in plan.request_ids.tolist()
        ]
        return self.scheduler.finish_step(plan, StepResult(np.array(drawn, np.int32), **details))

    def step(self, tokens=7):
        """Plan and finish a step: what `plan` returns."""
        counts = self.plan()
        if counts:
            self.finish(tokens)
        return counts

    def run(self, tokens=7, most=200):
        """Run until nobody is left; {id: finish reason}."""
        ended = {}
        for _ in range(most):
            if not self.scheduler.has_work:
                return ended
            assert self.plan()
            ended |= {end.request_id: end.reason for end in self.finish(tokens).finished}
        raise AssertionError("somebody is still running")

    def abort(self, *ids):
        self.scheduler.abort(ids)

    @property
    def last(self):
        """The newest plan in flight."""
        return self.in_flight[-1]

    def sequence(self, request_id):
        return self.scheduler._roster.find(request_id)

    def status(self, request_id):
        return self.sequence(request_id).status.name

    def blocks(self, request_id, group=0):
        """A running request's block table."""
        row = self.sequence(request_id).row
        return self.table.block_tables[group, row, : self.table.num_blocks[group, row]].tolist()

    def computed(self, request_id):
        return int(self.table.num_computed[self.sequence(request_id).row])

    def refs(self, request_id):
        return [self.pool.refs[block] for block in self.blocks(request_id)]

    @property
    def free(self):
        """The free list, head first."""
        return self.pool.free_blocks()

    @property
    def running(self):
        return self.table.request_id[self.table.running].tolist()

    @property
    def stats(self):
        return self.scheduler.stats()


@pytest.fixture(scope="session")
def make_rig():
    return Rig
