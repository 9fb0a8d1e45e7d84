"""The torch draw, which is the specification of other backends, against numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.execution.ops import SamplingTensors
from pagedcore.execution.torch_sampling import filter_scores, sample, uniform


def sampling(temperature=1.0, min_p=0.0, top_k=0, top_p=1.0, uniform=0.5, num=1):
    """Each value is for one sequence, or a list for several."""

    def column(value, dtype):
        return torch.tensor(value if isinstance(value, list) else [value] * num, dtype=dtype)

    columns = SamplingTensors(
        temperature=column(temperature, torch.float32),
        min_p=column(min_p, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        uniform=column(uniform, torch.float32),
        all_greedy=False,
        any_filter=True,
    )
    columns.all_greedy = bool((columns.temperature == 0).all())
    return columns


def kept(probabilities, **filters):
    """Which tokens the filters keep of a distribution."""
    logits = torch.tensor([probabilities], dtype=torch.float64).log().float()
    return torch.isfinite(filter_scores(logits, sampling(**filters)))[0].nonzero()[:, 0].tolist()


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def reference(logits, temperature, min_p, top_k, top_p):
    """Probabilities after all filters, the plain way."""
    probs = softmax(logits.astype(np.float64) / temperature)
    probs = np.where(probs >= min_p * probs.max(), probs, 0)
    if 0 < top_k < len(probs):
        probs = np.where(probs >= np.sort(probs)[-top_k], probs, 0)
    probs = probs / probs.sum()
    if top_p == 1:
        return probs
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    allowed = np.zeros(len(probs), bool)
    allowed[order[before < top_p]] = True
    allowed[order[0]] = True
    probs = np.where(allowed, probs, 0)
    return probs / probs.sum()


def test_min_p_keeps_what_reaches_its_share_of_the_largest():
    assert kept([0.5, 0.25, 0.2, 0.05], min_p=0.5) == [0, 1]
    assert kept([0.5, 0.25, 0.2, 0.05], min_p=1.0) == [0]


def test_top_k_keeps_ties_of_the_kth():
    assert kept([0.3, 0.1, 0.3, 0.3], top_k=2) == [0, 2, 3]
    assert kept([0.4, 0.1, 0.3, 0.2], top_k=2) == [0, 2]
    assert kept([0.4, 0.1, 0.3, 0.2], top_k=9) == [0, 1, 2, 3]


def test_top_p_keeps_the_smallest_set_and_at_least_one():
    assert kept([0.5, 0.3, 0.2], top_p=0.5) == [0]
    assert kept([0.5, 0.3, 0.2], top_p=0.51) == [0, 1]
    assert kept([0.5, 0.3, 0.2], top_p=1e-9) == [0]
    assert kept([0.25, 0.25, 0.25, 0.25], top_p=0.5) == [0, 1]


def test_a_filter_works_on_what_the_one_before_left():
    # 0.4 is 0.57 of what top-k leaves, so one token reaches 0.5; of all, two would be needed
    assert kept([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.5) == [0]
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.5) == [0, 1]


def test_top_p_counts_the_tokens_that_it_will_never_keep():
    # many unlikely tokens hold a tenth together; the ones above must not seem more likely for it
    probabilities = [0.85, 0.04, 0.011, *[0.099 / 997] * 997]
    assert kept(probabilities, top_p=0.87) == [0, 1]
    assert kept(probabilities, top_p=0.9) == [0, 1, 2]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_filters_agree_with_the_plain_way_for_every_row_of_a_batch(data):
    num = data.draw(st.integers(1, 4), "rows")
    vocab_size = data.draw(st.sampled_from([1, 2, 40, 128, 130, 700]), "vocabulary")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    logits = rng.permuted(np.linspace(-6, 8, num * vocab_size)).reshape(num, vocab_size)
    logits = logits.astype(np.float32)

    def column(values):
        return data.draw(st.lists(values, min_size=num, max_size=num))

    temperature = column(st.sampled_from([0.3, 1.0, 1.7]))
    min_p = column(st.sampled_from([0.0, 0.013, 0.27]))
    top_k = column(st.sampled_from([0, 1, 3, 50, 100000]))
    top_p = column(st.sampled_from([0.123, 0.5001, 0.9, 0.99, 1.0]))

    scores = filter_scores(torch.from_numpy(logits), sampling(temperature, min_p, top_k, top_p))
    actual = scores.softmax(-1).numpy()

    parameters = zip(logits, temperature, min_p, top_k, top_p, strict=True)
    for row, expected in zip(actual, (reference(*p) for p in parameters), strict=True):
        border = (row > 0) != (expected > 0)
        assert border.sum() <= 1  # rounding may move the token at the border of top-p
        if not border.any():
            np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), draw=st.floats(0, 1, exclude_max=True, width=32))
def test_the_draw_is_the_first_token_whose_running_sum_exceeds_the_number(seed, draw):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(1, 300)).astype(np.float32) * 3
    running = np.cumsum(reference(logits[0], 0.9, 0.0, 20, 0.95))

    token = int(sample(torch.from_numpy(logits), sampling(0.9, 0.0, 20, 0.95, draw)))

    below = running[token - 1] if token else 0.0
    assert below - 1e-5 <= draw <= running[token] + 1e-5
    assert running[token] > below


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_and_random_rows_keep_to_themselves(dtype):
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = sample(logits, sampling([0.0, 1.0, 0.0], uniform=[0.9, 0.3, 0.1], num=3))
    assert tokens[0] == logits[0].argmax()
    assert tokens[2] == logits[2].argmax()
    alone = sample(logits[1:2], sampling(1.0, uniform=0.3))
    assert tokens[1] == alone[0]


def test_draws_are_as_frequent_as_they_should_be():
    num = 20_000
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(3)) * 2
    parameters = {"temperature": 0.8, "min_p": 0.01, "top_k": 12, "top_p": 0.95}
    numbers = uniform(torch.arange(num), torch.full((num,), 7))
    batch = sampling(**parameters, num=num)
    batch.uniform = numbers

    seen = np.bincount(sample(logits.expand(num, -1), batch).numpy(), minlength=30)

    expected = reference(logits[0].numpy(), **parameters) * num
    assert (seen[expected == 0] == 0).all()
    likely = expected > 0
    chi_square = ((seen - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = likely.sum() - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


def splitmix64(seed, position):
    """As published, in Python's own integers."""
    mask = 2**64 - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20))
def test_numbers_are_those_of_splitmix64(seed, position):
    number = uniform(torch.tensor([seed]), torch.tensor([position]))
    assert number.item() == (splitmix64(seed, position) >> 40) * 2.0**-24
    assert number.dtype == torch.float32


def test_the_generator_is_the_published_one():
    # The first outputs of splitmix64.c for the seed 1234567.
    assert [splitmix64(1234567, i) for i in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_numbers_are_spread_evenly_over_seeds_and_over_positions():
    many = torch.arange(50_000)
    for numbers in (uniform(many, torch.zeros_like(many)), uniform(torch.zeros_like(many), many)):
        seen = torch.histc(numbers, 50, 0, 1).numpy()
        assert ((seen - 1000) ** 2 / 1000).sum() < 49 + 5 * np.sqrt(98)
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


def test_the_largest_number_still_draws_a_token_that_has_a_probability():
    logits = torch.full((1, 200), -torch.inf)
    logits[0, [3, 90]] = 0.0
    last = sampling(uniform=1 - 2.0**-24)
    assert sample(logits, last).tolist() == [90]
    assert sample(logits, sampling(uniform=0.0)).tolist() == [3]
