"""Data sets of the benchmarks: what is asked, by name and by seed."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedcore.cli.bench.datasets import take_dataset
from pagedcore.cli.bench.sharegpt import TokenCounter, read_chats, sharegpt_requests
from pagedcore.cli.bench.synthetic import (
    MOST_PROMPT,
    MOST_TOTAL,
    chat_like_requests,
    random_requests,
    repeated_prefixes,
)
from pagedcore.errors import ConfigError


def count_words(text):
    return len(text.split())


def make(seed=0, vocab_size=50, **options):
    dataset = take_dataset(options)
    assert options == {}
    return dataset.requests(seed=seed, vocab_size=vocab_size, count_tokens=count_words)


def chat(prompt, answer):
    """A chat whose two turns have so many words."""
    turns = [("human", prompt), ("gpt", answer), ("human", 3)]
    return {"conversations": [{"from": who, "value": "word " * n} for who, n in turns]}


@pytest.fixture
def write_chats(tmp_path):
    def write(*chats):
        path = tmp_path / "chats.json"
        path.write_text(json.dumps(chats))
        return str(path)

    return write


@given(st.integers(1, 50), st.integers(0, 40), st.floats(0, 0.9), st.integers(0, 5))
def test_random_requests_have_the_lengths_that_were_asked_for(num, length, ratio, prefix):
    asked = dict(input_len=length, output_len=7, range_ratio=ratio, prefix_len=prefix)
    if length + prefix < 1:
        with pytest.raises(ConfigError):
            random_requests(num, **asked, vocab_size=9, seed=3)
        return
    requests = random_requests(num, **asked, vocab_size=9, seed=3)
    assert requests == random_requests(num, **asked, vocab_size=9, seed=3)
    assert len(requests) == num
    for request in requests:
        own = len(request.prompt) - prefix
        assert length * (1 - ratio) - 1 <= own <= length * (1 + ratio) + 1
        assert request.prompt[:prefix] == requests[0].prompt[:prefix]
        assert all(0 <= token < 9 for token in request.prompt)
        assert 1 <= request.output_len <= 7 * (1 + ratio) + 1


@given(st.integers(1, 60), st.integers(1, 8), st.booleans(), st.integers(0, 9))
def test_prefixes_are_shared_evenly(num, num_prefixes, shuffle, seed):
    asked = dict(
        prefix_len=12, suffix_len=3, num_prefixes=num_prefixes, output_len=5, vocab_size=1000,
        seed=seed, shuffle=shuffle,
    )  # fmt: skip
    if num < num_prefixes:
        with pytest.raises(ConfigError, match="too few"):
            repeated_prefixes(num, **asked)
        return
    requests = repeated_prefixes(num, **asked)
    assert requests == repeated_prefixes(num, **asked)
    begins = [tuple(request.prompt[:12]) for request in requests]
    counts = Counter(begins)
    assert len(counts) == num_prefixes
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {len(request.prompt) for request in requests} == {15}
    if not shuffle:
        assert begins == sorted(begins, key=begins.index)


def test_lengths_like_those_of_chats_are_uneven_and_within_the_limits():
    requests = chat_like_requests(4000, output_len=None, vocab_size=9, seed=1)
    prompts = np.array([len(request.prompt) for request in requests])
    answers = np.array([request.output_len for request in requests])
    assert prompts.min() >= 4
    assert answers.min() >= 4
    assert prompts.max() <= MOST_PROMPT
    assert (prompts + answers).max() <= MOST_TOTAL
    for lengths in (prompts, answers):
        assert lengths.mean() == pytest.approx(200, rel=0.1)
        assert np.median(lengths) < 0.7 * lengths.mean()
    assert {r.output_len for r in chat_like_requests(9, output_len=7, vocab_size=9, seed=1)} == {7}


def test_chats_give_their_first_prompt_and_the_length_of_their_first_answer(write_chats):
    path = write_chats(chat(5, 9), chat(6, 8))
    requests = make(dataset_name="sharegpt", dataset_path=path, num_prompts=2, disable_shuffle=True)
    assert [(count_words(r.prompt), r.output_len) for r in requests] == [(5, 9), (6, 8)]


def test_chats_that_are_too_short_or_too_long_are_left_out(write_chats):
    path = write_chats(chat(3, 9), chat(5, 3), chat(1025, 5), chat(1000, 1049), chat(1024, 1024))
    options = dict(dataset_name="sharegpt", dataset_path=path, num_prompts=1)
    (request,) = make(**options)
    assert request.output_len == 1024
    lengths = {count_words(r.prompt) for r in make(**options | dict(num_prompts=3, output_len=2))}
    assert lengths == {5, 1000, 1024}  # the answer's own length no longer counts


def test_the_seed_decides_the_order_of_chats(write_chats):
    path = write_chats(*(chat(n, 5) for n in range(5, 60)))
    options = dict(dataset_name="sharegpt", dataset_path=path, num_prompts=10)
    assert make(**options) == make(**options)
    assert make(**options) != make(seed=1, **options)


def test_too_few_chats_are_asked_again_with_a_warning(write_chats, caplog):
    path = write_chats(chat(5, 5), chat(6, 6))
    requests = make(dataset_name="sharegpt", dataset_path=path, num_prompts=5, disable_shuffle=True)
    assert [r.output_len for r in requests] == [5, 6, 5, 6, 5]
    assert "2 chats suit" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{broken", "is not JSON"),
        ("{}", "JSON list"),
        ("[]", "no chat of two turns"),
        ('[1, {"conversations": 2}, {"conversations": [{"value": "alone"}]}]', "no chat of two"),
        ('[{"conversations": [{"value": 1}, {"value": "x"}]}, {"conversations": [1, 2]}]', "no ch"),
    ],
)
def test_a_file_that_holds_no_chats_is_refused(tmp_path, text, message):
    path = tmp_path / "chats.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_chats(path)


@pytest.mark.parametrize(("output_len", "message"), [(None, "no chat .* suits"), (0, "at least 1")])
def test_chats_of_which_none_suits_are_refused(output_len, message):
    with pytest.raises(ConfigError, match=message):
        sharegpt_requests([("a", "b")], 3, count_words, output_len=output_len, seed=0, shuffle=True)


def test_a_model_without_a_tokenizer_here_asks_for_one():
    with pytest.raises(ConfigError, match="name a folder or a model with --tokenizer"):
        TokenCounter("org/model-of-a-server")("some text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dataset_name="sharegpt"), "sharegpt_like"),
        (dict(random_input_len=3, dataset_name="sharegpt_like"), "--random-input-len is for"),
        (dict(input_len=3, dataset_name="prefix_repetition"), "--input-len is for 'random'"),
        (dict(dataset_path="chats.json"), "--dataset-path is for 'sharegpt'"),
        (dict(prefix_repetition_num_prefixes=3), "'prefix_repetition', and the data set"),
        (dict(sharegpt_output_len=3), "'sharegpt' and 'sharegpt_like'"),
        (dict(num_prompts=0), "num_prompts must be at least 1"),
    ],
)
def test_options_that_the_data_set_does_not_look_at_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        take_dataset(options)


def test_one_flag_sets_the_answers_of_every_data_set(write_chats):
    path = write_chats(chat(5, 9))
    for options in (
        dict(),
        dict(dataset_name="sharegpt", dataset_path=path),
        dict(dataset_name="sharegpt_like"),
        dict(dataset_name="prefix_repetition", prefix_repetition_num_prefixes=1),
    ):
        requests = make(num_prompts=3, output_len=17, **options)
        assert [request.output_len for request in requests] == [17] * 3


def test_sizes_of_prefixes_come_from_their_own_flags():
    sizes = dict(prefix_repetition_prefix_len=4, prefix_repetition_suffix_len=2)
    requests = make(
        dataset_name="prefix_repetition", num_prompts=12, prefix_repetition_output_len=3, **sizes
    )
    assert {(len(r.prompt), r.output_len) for r in requests} == {(6, 3)}
    assert len({tuple(r.prompt[:4]) for r in requests}) == 10
