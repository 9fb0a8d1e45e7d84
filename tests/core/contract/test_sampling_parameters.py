import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedcore import SamplingParams
from pagedcore.errors import RequestError
from pagedcore.request import RepetitionDetection, SamplingLimits

FLOATS = [
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
]
INTEGERS = ["n", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "seed"]


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", True, None])
def test_no_string_boolean_or_infinity_is_a_number(field, value):  # SAMPLE-1, IN-6
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    assert error.value.param == field


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", ["1", True, 1.5, 2**64, math.nan])
def test_no_float_string_or_giant_is_an_integer(field, value):  # SAMPLE-1, IN-31
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    assert error.value.param == field


@pytest.mark.parametrize(
    ("field", "bad", "edge"),
    [
        ("temperature", -0.1, 0.0),
        ("top_p", 0.0, 1.0),
        ("top_p", 1.1, 1e-9),
        ("min_p", -0.1, 0.0),
        ("min_p", 1.1, 1.0),
        ("presence_penalty", 2.1, 2.0),
        ("frequency_penalty", -2.1, -2.0),
        ("repetition_penalty", 0.0, 1e-6),
        ("n", 0, 1),
        ("top_k", -2, -1),
        ("max_tokens", 0, 1),
        ("min_tokens", -1, 0),
        ("seed", 2**63, 2**63 - 1),
        ("seed", -(2**63) - 1, -(2**63)),
    ],
)
def test_the_limit_itself_is_accepted_and_one_more_is_not(field, bad, edge):  # SAMPLE-1
    SamplingParams(**{field: edge})
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: bad})
    assert error.value.param == field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"stop": [""]}, "stop"),  # DETOK-8
        ({"stop": "x", "detokenize": False}, "stop"),
        ({"bad_words": [""]}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stop_token_ids": ["7"]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ],
)
def test_a_contradiction_names_its_field(options, field):
    with pytest.raises(RequestError) as error:
        SamplingParams(**options)
    assert error.value.param == field


def test_one_stop_string_is_a_list_of_one():  # DETOK-8
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=None).stop == ()


def test_tiny_temperatures_are_greedy_and_small_ones_are_raised():  # SAMPLE-3
    assert SamplingParams(temperature=1e-6, top_p=0.5, top_k=3, min_p=0.1).top_p == 1.0
    assert SamplingParams(temperature=1e-6).is_greedy
    assert SamplingParams(temperature=0.001).temperature == 0.01


def test_logit_bias_is_clamped():
    assert SamplingParams(logit_bias={"3": 500, 4: -500}).logit_bias == {3: 100.0, 4: -100.0}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n": 129}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_a_deployment_caps_what_one_request_may_ask(options, field):  # LIMIT-1
    params = SamplingParams(**options)
    with pytest.raises(RequestError) as error:
        params.check_limits(SamplingLimits())
    assert error.value.param == field


def test_the_whole_vocabulary_is_allowed_only_without_a_cap():
    SamplingParams(logprobs=-1).check_limits(SamplingLimits(max_logprobs=-1))


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
@pytest.mark.parametrize("token", [-1, 100])
def test_a_token_id_outside_the_vocabulary_is_refused(field, token):  # SAMPLE-4, IN-8
    value = {token: 1.0} if field == "logit_bias" else [token]
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value}).check_vocabulary(100)
    assert error.value.param == field


@given(st.integers(-(2**63), 2**63 - 1), st.integers(2, 128), st.data())
def test_each_choice_has_its_own_seed_that_wraps(seed, n, data):  # SAMPLE-10
    index = data.draw(st.integers(0, n - 1))
    choice = SamplingParams(n=n, seed=seed).for_choice(index)
    assert choice.n == 1
    assert (choice.seed - seed - index) % 2**64 == 0


@pytest.mark.parametrize("sizes", [(1, 1, 1), (0, 2, 0), (2, 2, 3)])
def test_an_impossible_repetition_pattern_is_refused(sizes):  # STOP-5
    largest, count, smallest = sizes
    with pytest.raises(RequestError):
        RepetitionDetection(largest, count, smallest)


def test_a_pattern_may_be_as_short_as_one_token():  # STOP-5
    assert RepetitionDetection(2, 3, 0).min_pattern_size == 1
