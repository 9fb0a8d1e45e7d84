"""The draw in triton against the torch draw, which is its specification."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.execution import torch_sampling
from pagedcore.execution.ops import SamplingTensors
from pagedcore_kernels import filtered_sampling
from pagedcore_kernels.sampling import sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def parameters(num, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0, uniform=0.5):
    """Each value is for all rows, or a list for each."""

    def column(value, dtype):
        values = value if isinstance(value, list) else [value] * num
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    made = SamplingTensors(
        temperature=column(temperature, torch.float32),
        min_p=column(min_p, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        uniform=column(uniform, torch.float32),
        all_greedy=False,
        any_filter=False,
    )
    made.all_greedy = bool((made.temperature == 0).all())
    made.any_filter = bool(((made.min_p > 0) | (made.top_k > 0) | (made.top_p < 1)).any())
    return made


def random_logits(num, vocab_size, *, seed=0, spread=3.0, dtype=torch.float32):
    logits = torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(seed))
    return (logits * spread).to(dtype).to(DEVICE)


def probabilities(logits, sampling):
    """What the specification keeps of each row, in float64."""
    return torch_sampling.filter_scores(logits, sampling).double().softmax(-1).cpu()


def assert_drawn_where_the_sum_passes(tokens, logits, sampling, slack=3e-6):
    """Each token's running mass surrounds the uniform, up to rounding; none has no mass."""
    probs = probabilities(logits, sampling)
    running = probs.cumsum(-1)
    uniform = sampling.uniform.double().cpu()
    for row, token in enumerate(tokens.tolist()):
        if sampling.temperature[row] == 0:
            assert token == int(logits[row].argmax())
            continue
        mass = float(probs[row, token])
        end = float(running[row, token])
        assert mass > 0, (row, token)
        assert end - mass - slack <= float(uniform[row]) <= end + slack, (row, token)


def test_greedy_takes_the_first_of_the_largest():
    logits = random_logits(5, 3000)
    logits[0, [7, 1500, 2999]] = 50.0
    logits[1, [1023, 1024]] = 50.0
    logits[2, 2999] = 50.0
    logits[3] = -7.25
    logits[4, :] = -torch.inf
    logits[4, 2047] = -1e30
    assert sample(logits, parameters(5, temperature=0.0)).tolist() == [7, 1023, 2999, 0, 2047]


def test_both_zeros_are_equal():
    logits = torch.full((1, 40), -1.0, device=DEVICE)
    logits[0, 3], logits[0, 9] = -0.0, 0.0
    assert sample(logits, parameters(1, temperature=0.0)).tolist() == [3]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_row_without_a_finite_peak_gives_a_token_that_shows_it(temperature, top_p):
    logits = random_logits(5, 2500)
    logits[0, 1700] = torch.nan
    logits[1, 30], logits[1, 2400] = torch.inf, torch.nan
    logits[2, 1500] = torch.inf
    logits[3] = -torch.inf
    logits[4] = torch.nan
    tokens = sample(logits, parameters(5, temperature=temperature, top_p=top_p))
    assert tokens.tolist() == [1700, 2400, 1500, 0, 0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab_size", [1, 2, 1000, 1024, 1025, 5000])
def test_an_unfiltered_draw_is_where_the_running_mass_passes_the_uniform(vocab_size, dtype):
    uniforms = [*np.random.default_rng(vocab_size).random(3).tolist(), 0.0, 1 - 2.0**-24]
    logits = random_logits(len(uniforms), vocab_size, seed=vocab_size, dtype=dtype)
    chosen = parameters(len(uniforms), temperature=0.8, uniform=uniforms)
    tokens = sample(logits, chosen)
    assert tokens.dtype == torch.int64
    assert_drawn_where_the_sum_passes(tokens, logits, chosen)


def test_draws_equal_those_of_plain_torch():
    rng = np.random.default_rng(5)
    uniforms = rng.random(20).tolist()
    logits = random_logits(20, 600, seed=9)
    chosen = parameters(20, temperature=rng.uniform(0.3, 1.5, 20).tolist(), uniform=uniforms)
    assert torch.equal(sample(logits, chosen), torch_sampling.sample(logits, chosen))
    chosen = parameters(20, top_k=20, top_p=0.9, uniform=uniforms)
    assert torch.equal(sample(logits, chosen), torch_sampling.sample(logits, chosen))


def test_a_draw_does_not_depend_on_batch_mates():
    logits = random_logits(6, 4000)
    temperature = [0.5, 0.0, 0.9, 1.2, 0.7, 0.7]
    top_k, top_p = [0, 0, 0, 7, 0, 300], [1.0, 1.0, 1.0, 1.0, 0.8, 0.9]
    uniforms = [0.1, 0.9, 0.99, 0.4, 0.6, 0.2]
    together = sample(
        logits, parameters(6, temperature, top_k=top_k, top_p=top_p, uniform=uniforms)
    )
    for i in range(6):
        alone = parameters(1, temperature[i], 0.0, top_k[i], top_p[i], uniforms[i])
        assert sample(logits[i : i + 1], alone).tolist() == [int(together[i])]


def test_rows_may_be_strided_and_beyond_the_vocabulary_is_never_read():
    backing = torch.full((4, 1500), torch.nan, device=DEVICE)
    backing[:, :1100] = random_logits(4, 1100)
    for filters in ({}, {"top_k": 3}, {"top_p": 0.7}):
        chosen = parameters(4, uniform=[0.1, 0.4, 0.8, 0.999], **filters)
        tokens = sample(backing[:, :1100], chosen)
        assert torch.equal(tokens, sample(backing[:, :1100].contiguous(), chosen))
        assert_drawn_where_the_sum_passes(tokens, backing[:, :1100], chosen)


def kept(probs, **filters):
    """Which tokens can be drawn, by a fine grid of uniforms."""
    num = 6
    logits = torch.tensor([probs] * num, dtype=torch.float64, device=DEVICE).log().float()
    uniforms = ((np.arange(num) + 0.5) / num).tolist()
    return sorted(set(sample(logits, parameters(num, uniform=uniforms, **filters)).tolist()))


def test_filters_keep_what_the_semantics_say():
    assert kept([0.5, 0.25, 0.2, 0.05], min_p=0.5) == [0, 1]
    assert kept([0.5, 0.25, 0.2, 0.05], min_p=1.0) == [0]
    assert kept([0.3, 0.1, 0.3, 0.3], top_k=2) == [0, 2, 3]  # SAMPLE-7: ties are kept
    assert kept([0.4, 0.1, 0.3, 0.2], top_k=2) == [0, 2]
    assert kept([0.2, 0.3, 0.3, 0.2], top_k=9) == [0, 1, 2, 3]
    assert kept([0.5, 0.3, 0.2], top_p=0.5) == [0]
    assert kept([0.5, 0.3, 0.2], top_p=0.51) == [0, 1]
    assert kept([0.5, 0.3, 0.2], top_p=1e-9) == [0]
    assert kept([0.25, 0.25, 0.25, 0.25], top_p=0.5) == [0, 1]
    assert kept([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.5) == [0]
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.5) == [0, 1]


FILTERS = [
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 900},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1e-6},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 5000, "top_p": 0.95, "min_p": 1e-5},
    {"min_p": 0.01, "top_p": 0.9},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("spread", "dtype"), [(0.5, torch.bfloat16), (4.0, torch.float32)])
def test_a_filtered_draw_is_one_of_those_kept_in_order_of_mass(filters, spread, dtype):
    uniforms = [0.3, 0.77, 1 - 2.0**-24]
    logits = random_logits(3, 6000, seed=3, spread=spread, dtype=dtype)
    chosen = parameters(3, uniform=uniforms, **filters)
    tokens = sample(logits, chosen)
    # of flat distributions the token at top-p's border may differ by rounding
    assert_drawn_where_the_sum_passes(tokens, logits, chosen, slack=2e-5)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_short_lists_change_nothing(filters, monkeypatch):
    """A list that is too short sends rows down the other path, with the same tokens."""
    logits = random_logits(3, 3000, seed=4, spread=2.0, dtype=torch.float16)
    chosen = parameters(3, uniform=[0.01, 0.5, 0.99], **filters)
    tokens = sample(logits, chosen)
    monkeypatch.setattr(filtered_sampling, "CAPACITY", 1)
    assert torch.equal(sample(logits, chosen), tokens)


def test_rows_of_equal_logits_keep_ties_of_top_k_and_the_first_ids_of_top_p():
    for vocab_size in (500, 5000):  # within a list and beyond
        logits = torch.full((3, vocab_size), 1.5, device=DEVICE)
        uniforms = [0.0, 0.5, 1 - 2.0**-24]
        last = sample(logits, parameters(3, top_k=3, uniform=uniforms)).tolist()
        assert last == [0, vocab_size // 2, vocab_size - 1]
        last = sample(logits, parameters(3, top_p=0.5, uniform=uniforms)).tolist()
        assert last == [0, vocab_size // 4, vocab_size // 2 - 1]


def test_masked_tokens_are_never_drawn():
    logits = torch.full((4, 5000), -torch.inf, device=DEVICE)
    allowed = [3, 1024, 4999]
    logits[:, allowed] = torch.tensor([0.1, 0.3, 0.2], device=DEVICE)
    for filters in ({}, {"top_k": 2}, {"top_k": 4000}, {"top_p": 0.99}, {"min_p": 0.1}):
        chosen = parameters(4, uniform=[0.0, 0.4, 0.6, 1 - 2.0**-24], **filters)
        assert set(sample(logits, chosen).tolist()) <= set(allowed)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_frequencies_follow_the_distribution(filters):
    num, vocab_size = 20000 if DEVICE == "cuda" else 60, 8
    logits = random_logits(1, vocab_size, seed=1, spread=1.0).expand(num, -1).contiguous()
    uniforms = np.random.default_rng(0).random(num).astype(np.float32).tolist()
    chosen = parameters(num, temperature=0.9, uniform=uniforms, **filters)
    counts = np.bincount(sample(logits, chosen).cpu(), minlength=vocab_size)
    expected = probabilities(logits[:1], chosen_first(chosen))[0].numpy() * num
    assert not counts[expected == 0].any()
    used = expected > 0
    chi_square = ((counts - expected)[used] ** 2 / expected[used]).sum()
    degrees = used.sum() - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def chosen_first(sampling):
    columns = ("temperature", "min_p", "top_k", "top_p", "uniform")
    first = {name: getattr(sampling, name)[:1] for name in columns}
    return SamplingTensors(**first, all_greedy=False, any_filter=sampling.any_filter)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_mixture_of_rows_draws_what_each_asked_for(data):
    num = data.draw(st.integers(1, 3), "rows")
    vocab_size = data.draw(st.sampled_from([1, 40, 1100, 4500]), "vocabulary")
    logits = random_logits(
        num,
        vocab_size,
        seed=data.draw(st.integers(0, 2**31), "seed"),
        spread=data.draw(st.sampled_from([0.1, 2.0, 20.0]), "spread"),
        dtype=data.draw(st.sampled_from(FLOATS)),
    )

    def column(values):
        return data.draw(st.lists(values, min_size=num, max_size=num))

    chosen = parameters(
        num,
        column(st.sampled_from([0.0, 0.05, 1.0, 1.7])),
        column(st.sampled_from([0.0, 0.013, 0.27])),
        column(st.sampled_from([0, 1, 3, 50, 4100, 100000])),
        column(st.sampled_from([0.123, 0.9, 0.99, 1.0])),
        column(st.floats(0, 1, exclude_max=True, width=32).filter(lambda u: u < 1)),
    )
    assert_drawn_where_the_sum_passes(sample(logits, chosen), logits, chosen, slack=1e-4)
