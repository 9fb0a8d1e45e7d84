"""The driver that shrinks: Hypothesis chooses the operations, the world checks them."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pagedcore.request import RepetitionDetection, SamplingParams
from pagedcore.testing.hash_model import Fault
from pagedcore.testing.scheduler_world import World, WorldConfig

MOST_LIVE = 10

configs = st.builds(
    WorldConfig,
    num_blocks=st.integers(7, 16),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(1, 4),
    budget=st.sampled_from([4, 7, 64]),
    max_model_len=st.sampled_from([6, 12, 20]),
    windows=st.sampled_from([(None,), (None,), (3,), (None, 4)]),
    vocab_size=st.integers(2, 3),
    depth=st.integers(1, 2),
    prefix_caching=st.booleans(),
    hash_bytes=st.sampled_from([None, 1]),
    priorities=st.booleans(),
    threshold=st.sampled_from([0, 3]),
    reserves_all=st.booleans(),
    watermark=st.sampled_from([0.0, 0.2]),
)
parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    max_tokens=st.integers(1, 12),
    seed=st.sampled_from([None, 4]),
    stop_token_ids=st.sampled_from([(), (1,)]),
    logprobs=st.sampled_from([None, 1]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
    repetition_detection=st.sampled_from(
        [None, RepetitionDetection(max_pattern_size=2, min_count=2)]
    ),
)
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=12)


class Schedulers(RuleBasedStateMachine):
    """Every rule ends in `World.check`."""

    @initialize(config=configs)
    def begin(self, config):
        self.world = World(config)

    def room(self):
        return len(self.world.live) < MOST_LIVE

    def somebody(self):
        return bool(self.world.live)

    def request(self, prompt, params, **fields):
        fitting = prompt[: self.world.longest - 1]
        return self.world.request(fitting, params=params, **fields)

    @precondition(room)
    @rule(
        prompt=prompts,
        choices=st.lists(parameters, min_size=1, max_size=3),
        salt=st.sampled_from([None, "a"]),
        priority=st.integers(0, 2),
        eos=st.sampled_from([-1, 0, 2]),
    )
    def add(self, prompt, choices, salt, priority, eos):
        fields = dict(cache_salt=salt, priority=priority, eos_token_id=eos)
        family = [self.request(prompt, params, **fields) for params in choices]
        for request in family:
            request.arrival_time = family[0].arrival_time
        self.world.add(family[0], family[1:])

    @rule(params=parameters, excess=st.integers(0, 9))
    def add_what_never_fits(self, params, excess):
        length = self.world.longest + excess
        self.world.refuse(self.world.request([0] * length, params=params))

    @precondition(lambda self: self.room() and self.somebody())
    @rule(data=st.data(), children=st.lists(parameters, min_size=1, max_size=3))
    def fork(self, data, children):
        parent = self.choose(data)
        if all(params.max_tokens > len(parent.outputs) for params in children):
            requests = [self.request([0], params) for params in children]
            self.world.fork(parent.request.id, requests)

    @precondition(somebody)
    @rule(data=st.data())
    def abort(self, data):
        self.world.abort([self.choose(data).request.id])

    @precondition(somebody)
    @rule(data=st.data())
    def preempt(self, data):
        self.world.preempt(self.choose(data).request.id)

    def choose(self, data):
        return self.world.live[data.draw(st.sampled_from(sorted(self.world.live)))]

    @rule()
    def evict_all(self):
        self.world.evict_all()

    @rule()
    def reset(self):
        self.world.reset_prefix_cache()

    @rule(steps=st.integers(1, 6))
    def advance(self, steps):
        for _ in range(steps):
            self.world.advance()

    @precondition(lambda self: self.world.can_plan)
    @rule()
    def plan(self):
        self.world.plan()

    @precondition(lambda self: self.world.can_plan)
    @rule(data=st.data(), whole=st.booleans(), early=st.booleans())
    def plan_with_a_fault(self, data, whole, early):
        def fault(plan):
            if whole:
                return Fault(before_anything=early)
            return Fault(rows=frozenset([data.draw(st.sampled_from(plan.rows.tolist()))]))

        self.world.plan(fault)

    @precondition(lambda self: self.world.in_flight)
    @rule()
    def finish(self):
        self.world.finish()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


Schedulers.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestSchedulers = Schedulers.TestCase
