"""One model, many ways to run it, one answer (reliability R20; SCHED-12, PRE-2, ASYNC-7)."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedcore import SamplingParams
from pagedcore.request import Request

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=NUM_TOKENS, ignore_eos=True)

SMALL_POOL = dict(max_model_len=96, block_size=4, num_gpu_blocks_override=30)
"""Holds the longest sequence and not much more: sequences take blocks from each other."""

SETTINGS = {
    "batched": {},
    "one at a time": dict(max_num_seqs=1),
    "chunks of 7": dict(max_num_batched_tokens=7, max_num_seqs=4),
    "chunks of 64": dict(max_num_batched_tokens=64),
    "chunks that leave room": dict(max_num_batched_tokens=64, long_prefill_token_threshold=5),
    "whole prompts": dict(enable_chunked_prefill=False, max_num_batched_tokens=256),
    "no prefix cache": dict(enable_prefix_caching=False),
    "blocks of 1": dict(block_size=1, num_gpu_blocks_override=1000),
    "blocks of 8": dict(block_size=8),
    "blocks of 64": dict(block_size=64),
    "hashes of xxhash_cbor": dict(prefix_caching_hash_algo="xxhash_cbor"),
    "room left free": dict(kv_watermark=0.5),
    "preempted": SMALL_POOL,
    "preempted, no prefix cache": SMALL_POOL | dict(enable_prefix_caching=False),
    "preempted, chunks of 7": SMALL_POOL | dict(max_num_batched_tokens=7, max_num_seqs=6),
    "preempted, any chunk admitted": SMALL_POOL | dict(scheduler_reserve_full_isl=False),
    "preempted, priority": SMALL_POOL | dict(scheduling_policy="priority"),
}


def some_prompts():
    """Token ids; the first half begin alike, over more or less than a block."""
    random = np.random.default_rng(5)
    common = random.integers(0, 320, 40).tolist()
    prompts = []
    lengths = (1, 2, 15, 16, 17, 31, 32, 33, 48, 5, 70, 23, 1, 3, 8, 64, 65, 40, 12, 29)
    for i, length in enumerate(lengths):
        own = random.integers(0, 320, length).tolist()
        prompts.append(common[: 5 * i] + own if i < 8 else own)
    return prompts


PROMPTS = some_prompts()


@pytest.fixture(scope="module")
def expected(tiny):
    return [tiny.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected_windowed(windowed):
    return [windowed.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def sampled(tiny):
    """What each prompt gives alone, with a seed of its own."""
    with tiny.llm(max_num_seqs=1) as llm:
        return [tokens_of(llm, [p], seeded([i]))[0] for i, p in enumerate(PROMPTS)]


def seeded(seeds):
    return [replace(SAMPLED, seed=seed) for seed in seeds]


def tokens_of(llm, prompts, params=GREEDY):
    outputs = llm.generate(prompts, params, progress=False)
    return [output.outputs[0].token_ids for output in outputs]


def request(request_id, prompt, params=GREEDY, **fields):
    ids = np.array(prompt, np.int32)
    return Request(id=request_id, prompt_token_ids=ids, params=params, **fields)


def step(llm, tokens):
    """Run a step; adds what it gave to `tokens`, by request id."""
    output = llm.engine.step()
    if output is not None:
        for one, token in zip(output.request_ids.tolist(), output.tokens.tolist(), strict=True):
            tokens.setdefault(one, []).append(token)


def run(llm, tokens):
    while llm.engine.has_work:
        step(llm, tokens)
    return tokens


def assert_nothing_is_left(llm):
    assert not llm.engine.has_work
    assert llm.engine.stats()["kv_cache_usage_perc"] == 0
    assert llm.engine.reset_prefix_cache()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("in_flight", [False, True])
def test_greedy_tokens_are_those_of_transformers(tiny, expected, setting, in_flight):
    """ASYNC-7 with `in_flight`: a step is planned before the last one's tokens are known."""
    with tiny.llm(**SETTINGS[setting], in_flight=in_flight) as llm:
        assert tokens_of(llm, PROMPTS) == expected
        assert tokens_of(llm, PROMPTS[::-1]) == expected[::-1]  # the prefix cache is warm now
        stats = llm.engine.stats()
        assert (stats["num_preemptions"] > 0) == ("preempted" in setting)
        assert (stats["prefix_cache_hits"] > 0) == ("no prefix cache" not in setting)
        assert_nothing_is_left(llm)


@pytest.mark.parametrize("setting", SETTINGS)
def test_windows_change_nothing_of_that(windowed, expected_windowed, setting):  # SLOT-6
    options = SETTINGS[setting]
    if "preempted" in setting:  # a window leaves nothing behind before a whole prompt has run
        options = options | dict(num_gpu_blocks_override=52)
    with windowed.llm(**options) as llm:
        assert tokens_of(llm, PROMPTS) == expected_windowed
        assert tokens_of(llm, PROMPTS[::-1]) == expected_windowed[::-1]
        assert (llm.engine.stats()["num_preemptions"] > 0) == ("preempted" in setting)
        assert_nothing_is_left(llm)


@pytest.mark.parametrize("setting", SETTINGS)
def test_seeded_tokens_do_not_depend_on_batch_mates(tiny, sampled, setting):  # SAMPLE-10
    with tiny.llm(**SETTINGS[setting]) as llm:
        order = np.random.default_rng(1).permutation(len(PROMPTS)).tolist()
        got = tokens_of(llm, [PROMPTS[i] for i in order], seeded(order))
        assert got == [sampled[i] for i in order]


@pytest.mark.parametrize("setting", ["batched", "chunks of 7", "no prefix cache", "preempted"])
def test_each_choice_of_n_is_a_request_with_a_seed_of_its_own(tiny, setting):  # SAMPLE-10, FORK-2
    prompts, top = PROMPTS[5:8], 2**63 - 1
    with tiny.llm(**SETTINGS[setting]) as llm:
        outputs = llm.generate(prompts, replace(SAMPLED, n=3, seed=top - 1), progress=False)
        assert llm.engine.stats()["fork_requests"] == 6
        assert_nothing_is_left(llm)
        for prompt, output in zip(prompts, outputs, strict=True):
            alone = tokens_of(llm, [prompt] * 3, seeded([top - 1, top, -top - 1]))  # it wraps
            assert [choice.token_ids for choice in output.outputs] == alone
            assert len({tuple(tokens) for tokens in alone}) == 3


def test_more_choices_than_rows_are_the_same_choices(tiny):  # FORK-8
    with tiny.llm(max_num_seqs=2) as few, tiny.llm() as many:
        params = replace(SAMPLED, n=7, seed=1)
        a, b = (llm.generate(PROMPTS[7:9], params, progress=False) for llm in (few, many))
        for left, right in zip(a, b, strict=True):
            assert [c.token_ids for c in left.outputs] == [c.token_ids for c in right.outputs]


def test_steps_in_flight_cost_a_request_one_pass_at_most(tiny, expected, monkeypatch):
    """ASYNC-7: a stop token shows only when the next pass is under way."""
    params = replace(GREEDY, stop_token_ids=(expected[0][5],))
    num_launched = []
    for in_flight in (False, True):
        with tiny.llm(in_flight=in_flight) as llm:
            launched, executor = [], llm.engine._executor
            launch = executor.launch
            monkeypatch.setattr(
                executor, "launch", lambda plan, go=launch, to=launched: to.append(plan) or go(plan)
            )
            assert tokens_of(llm, PROMPTS[:1], params) == [expected[0][:6]]
            num_launched.append(len(launched))
    assert num_launched == [6, 7]


@pytest.mark.parametrize("setting", ["batched", "no prefix cache", "blocks of 1", "preempted"])
@pytest.mark.parametrize("num_known", [0, 1, 5, 9])
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_fork_goes_on_as_a_request_with_its_tokens_would(
    tiny, expected, setting, num_known, in_flight
):
    """FORK-12, at any time: while the prompt waits, and until shortly before the end."""
    with tiny.llm(**SETTINGS[setting], in_flight=in_flight) as llm:
        tokens = {}
        for i, prompt in enumerate(PROMPTS[6:11]):
            llm.engine.add(request(i, prompt))
        while len(tokens.get(0, ())) < num_known:
            step(llm, tokens)
        known = list(tokens.get(0, ()))
        shorter = replace(GREEDY, max_tokens=NUM_TOKENS - 1)
        llm.engine.fork(0, [request(10, []), request(11, [], shorter)])
        run(llm, tokens)
        assert [tokens[i] for i in range(5)] == expected[6:11]
        assert known + tokens[10] == expected[6]
        assert known + tokens[11] == expected[6][:-1]
        assert_nothing_is_left(llm)


def test_salted_requests_share_with_their_salt_only_and_give_the_same(tiny, expected):  # KV-5
    with tiny.llm() as llm:

        def num_hits(number, salt):
            before = llm.engine.stats()["prefix_cache_hits"]
            llm.engine.add(request(number, PROMPTS[10], cache_salt=salt))
            assert run(llm, {})[number] == expected[10]
            return llm.engine.stats()["prefix_cache_hits"] - before

        salts = (None, "a", None, "a", "b")
        assert list(itertools.starmap(num_hits, enumerate(salts))) == [0, 0, 64, 64, 0]


@pytest.mark.parametrize("setting", ["batched", "chunks of 7", "preempted"])
@pytest.mark.parametrize("in_flight", [False, True])
def test_who_leaves_changes_nothing_for_who_stays(tiny, expected, setting, in_flight):
    """CANCEL-1: some leave while they wait, others amid their prompt or their answer."""
    with tiny.llm(**SETTINGS[setting], in_flight=in_flight) as llm:
        tokens, count = {}, len(PROMPTS)
        for i, prompt in enumerate(PROMPTS):
            llm.engine.add(request(i, prompt))
            llm.engine.add(request(count + i, prompt[::-1]))
        for i in range(count):
            step(llm, tokens)
            llm.engine.abort([count + i])
        run(llm, tokens)
        assert [tokens[i] for i in range(count)] == expected
        assert_nothing_is_left(llm)


@st.composite
def engines(draw):
    """Settings of an engine that is short of one thing or another."""
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    max_num_seqs = draw(st.integers(1, 6))
    budget = max_num_seqs + draw(st.integers(0, 80))
    longest = -(-100 // block_size)
    in_window = min(longest, -(-(11 + budget) // block_size) + 1)
    return dict(
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=100,
        num_gpu_blocks_override=longest + in_window + 1 + draw(st.integers(0, longest)),
        enable_prefix_caching=draw(st.booleans()),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 3])),
        scheduler_reserve_full_isl=draw(st.booleans()),
        in_flight=draw(st.booleans()),
    )


KINDS = st.sampled_from(["add", "add", "fork", "abort"])
EVENTS = st.lists(
    st.tuples(KINDS, st.integers(0, len(PROMPTS) - 1), st.integers(0, 4)), min_size=4, max_size=24
)
"""What happens, to which prompt or live request, and how many steps follow."""


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options=engines(), events=EVENTS, has_window=st.booleans())
def test_whatever_happens_tokens_are_those_of_transformers(
    tiny, expected, windowed, expected_windowed, options, events, has_window
):
    model, known = (windowed, expected_windowed) if has_window else (tiny, expected)
    with model.llm(**options) as llm:
        tokens, prompt_of, gone = {}, {}, set()
        for number, (kind, which, num_steps) in enumerate(events):
            live = [i for i in prompt_of if i not in gone and len(tokens[i]) < NUM_TOKENS - 2]
            if kind == "add" or not live:
                prompt_of[number], tokens[number] = which, []
                llm.engine.add(request(number, PROMPTS[which]))
            elif kind == "fork":
                parent = live[which % len(live)]
                prompt_of[number], tokens[number] = prompt_of[parent], list(tokens[parent])
                llm.engine.fork(parent, [request(number, [])])
            else:
                gone.add(live[which % len(live)])
                llm.engine.abort([live[which % len(live)]])
            for _ in range(num_steps):
                step(llm, tokens)
        run(llm, tokens)
        for number, which in prompt_of.items():
            if number not in gone:
                assert tokens[number] == known[which]
        assert_nothing_is_left(llm)
