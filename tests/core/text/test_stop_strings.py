"""Stop strings in streamed text (semantics DETOK-3 to DETOK-6, DETOK-9)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedcore.text.stop import StopStrings

letters = st.text("abc", max_size=6)
stops = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


def run(stop, pieces, *, include=False, min_tokens=0):
    """Deltas for pieces of text, one piece per token, and the match with its token's number."""
    search = StopStrings(stop, include=include)
    deltas = []
    for count, piece in enumerate(pieces, 1):
        text, match = search.push(piece, may_match=count > min_tokens)
        deltas.append(text)
        if match is not None:
            return deltas, match, count
    return [*deltas, search.flush()], None, None


def reference(stop, pieces, *, include, min_tokens):
    """The same by looking at all of the text after each of its characters."""
    text = ""
    for count, piece in enumerate(pieces, 1):
        for char in piece:
            text += char
            found = next((s for s in stop if text.endswith(s)), None)
            if found is not None and count > min_tokens:
                return (text if include else text[: -len(found)]), found, count
    return text, None, None


@given(stops, st.lists(letters, max_size=8), st.booleans(), st.integers(0, 4))
def test_any_pieces_end_where_a_search_of_all_text_does(stop, pieces, include, min_tokens):
    deltas, match, count = run(stop, pieces, include=include, min_tokens=min_tokens)
    expected = reference(stop, pieces, include=include, min_tokens=min_tokens)
    assert ("".join(deltas), match, count) == expected


@given(stops, st.lists(letters, max_size=8))
def test_exactly_the_longest_possible_beginning_is_held_back(stop, pieces):  # DETOK-3
    deltas, match, _ = run(stop, pieces)
    if match is None:
        text = "".join(pieces)
        sent = len("".join(deltas[:-1]))
        assert sent == max(0, len(text) - max(map(len, stop)) + 1)


def test_the_rules_example():  # DETOK-9
    pieces = ["ab", "cE", "N", "Dx"]
    assert run(["END"], pieces) == (["", "ab", "c", ""], "END", 4)
    assert run(["END"], pieces, include=True) == (["ab", "cE", "N", "D"], "END", 4)


@pytest.mark.parametrize(
    ("stop", "text", "match"), [(["b", "ab"], "xa", "b"), (["ab", "b"], "x", "ab")]
)
def test_of_matches_that_end_together_the_first_listed_wins(stop, text, match):  # DETOK-5
    deltas, found, _ = run(stop, ["xab"])
    assert ("".join(deltas), found) == (text, match)


def test_the_match_that_completes_first_wins_though_another_begins_before():  # DETOK-5
    assert run(["abcd", "c"], ["abcd"]) == (["ab"], "c", 1)


def test_a_match_may_begin_in_the_first_tokens_but_not_end_there():  # DETOK-4
    assert run(["ab"], ["ab", "a", "b"], min_tokens=2) == (["a", "b", ""], "ab", 3)
