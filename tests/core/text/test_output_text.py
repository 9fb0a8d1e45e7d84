"""A choice's tokens into deltas, to the end (semantics DETOK-6, 7, 9 and STOP-7)."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedcore.request import FinishReason, SamplingParams
from pagedcore.text.output_text import OutputText, TextDelta

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.fixture(scope="module")
def letters(spelling):
    """Tokens "ab" 0, "cE" 1, "N" 2, "Dx" 3, "\n" 4, and </s> 6."""
    return spelling("ab", "cE", "N", "Dx", "\n", eos="</s>")


def text_of(tokenizer, prompt=(), **fields):
    eos = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return OutputText(tokenizer, list(prompt), SamplingParams(**fields), eos_token_id=eos)


def test_the_rules_example_in_tokens(letters):  # DETOK-9
    output = text_of(letters, stop="END")
    deltas = [output.push([token]) for token in range(4)]
    assert [(delta.text, delta.stop) for delta in deltas] == [
        ("", None),
        ("ab", None),
        ("c", None),
        ("", "END"),
    ]
    output = text_of(letters, stop="END", include_stop_str_in_output=True)
    assert [output.push([token]).text for token in range(4)] == ["ab", "cE", "N", "D"]


def test_only_tokens_up_to_the_one_that_completed_the_match_count(letters):  # DETOK-6
    output = text_of(letters, stop="END")
    assert output.push([0, 1, 2, 3, 0, 0]) == TextDelta("abc", 4, "END")


def test_what_is_held_back_comes_out_at_the_end(letters):  # DETOK-3
    output = text_of(letters, stop="END")
    assert output.push([0, 1]).text == "ab"
    assert output.push([2], finish_reason=LENGTH) == TextDelta("cEN", 1, None)


def test_an_end_without_a_token_flushes_too(letters, byte_level):
    output = text_of(letters, stop="END")
    output.push([0, 1, 2])
    assert output.push([], finish_reason=FinishReason.ABORT) == TextDelta("EN", 0, None)
    output = text_of(byte_level)
    output.push(byte_level.encode("🙂")[:2])
    assert output.push([], finish_reason=FinishReason.ABORT).text == "\ufffd"


def test_the_prompt_is_never_searched(letters):  # DETOK-4
    output = text_of(letters, prompt=[0, 1, 2], stop="END")
    assert output.push([3], finish_reason=LENGTH) == TextDelta("Dx", 1, None)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "ab"),
        ({"skip_special_tokens": False}, "ab"),
        ({"include_stop_str_in_output": True}, "ab"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "ab</s>"),
    ],
)
def test_eos_adds_text_only_when_it_is_included_and_not_skipped(letters, fields, text):  # DETOK-7
    delta = text_of(letters, **fields).push([0, 6], finish_reason=STOP)
    assert delta == TextDelta(text, 2, None)


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abN")])
def test_a_stop_ids_text_is_hidden_unless_included(letters, include, text):  # DETOK-7
    output = text_of(letters, stop_token_ids=[2], include_stop_str_in_output=include)
    assert output.push([0, 2], finish_reason=STOP).text == text


def test_an_eos_token_that_did_not_end_the_output_keeps_its_text(letters):
    output = text_of(letters, ignore_eos=True, skip_special_tokens=False)
    assert output.push([0, 6, 0], finish_reason=LENGTH).text == "ab</s>ab"
    output = text_of(letters, ignore_eos=True, skip_special_tokens=False)
    assert output.push([0, 6], finish_reason=LENGTH).text == "ab</s>"


def test_a_hidden_stop_token_still_lets_what_was_held_out(byte_level):
    ids = byte_level.encode("🙂")
    output = text_of(byte_level, stop="xyz")
    output.push([byte_level.encode("a")[0], *ids[:2]])
    delta = output.push([byte_level.eos_token_id], finish_reason=STOP)
    assert delta == TextDelta("a\ufffd", 1, None)


@pytest.mark.parametrize("reason", [LENGTH, STOP])
def test_on_one_token_a_stop_string_wins(letters, reason):  # STOP-7
    output = text_of(letters, stop="END", stop_token_ids=[3])
    assert output.push([0, 1, 2, 3], finish_reason=reason) == TextDelta("abc", 4, "END")


def test_an_earlier_stop_string_wins_over_a_later_eos(letters):  # STOP-7
    output = text_of(letters, stop="N")
    assert output.push([0, 2, 0, 6], finish_reason=STOP) == TextDelta("ab", 2, "N")


def test_a_stop_string_within_the_first_min_tokens_is_passed_over(letters):  # DETOK-4
    output = text_of(letters, stop="\n", min_tokens=2)
    assert output.push([4, 4, 4, 0]) == TextDelta("\n\n", 3, "\n")
    output = text_of(letters, stop="N", stop_token_ids=[2], min_tokens=2)
    assert output.push([0, 2], finish_reason=STOP) == TextDelta("ab", 2, None)


def test_without_detokenizing_tokens_are_only_counted(letters):
    output = text_of(letters, detokenize=False)
    assert output.push([0, 1, 2]) == TextDelta("", 3, None)
    assert output.push([6], finish_reason=STOP) == TextDelta("", 1, None)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace"])
def test_no_chunking_changes_text_count_or_stop(kind, request, data):  # DETOK-1
    tokenizer = request.getfixturevalue(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=30))
    stop = data.draw(st.lists(st.sampled_from(["e", "th", "\n", "at", "\ufffd"]), max_size=2))
    fields = {
        "stop": stop,
        "min_tokens": data.draw(st.integers(0, 5)),
        "include_stop_str_in_output": data.draw(st.booleans()),
    }
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6).map(sorted))

    whole = text_of(tokenizer, **fields).push(ids, finish_reason=LENGTH)
    output = text_of(tokenizer, **fields)
    text, count, found = "", 0, None
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        last = end == len(ids)
        delta = output.push(ids[begin:end], finish_reason=LENGTH if last else None)
        text, count, found = text + delta.text, count + delta.num_tokens, delta.stop
        if last or found is not None:
            break
    assert TextDelta(text, count, found) == whole
