"""Bodies as bytes, and the list of what is ignored in them."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedcore.errors import RequestError
from pagedcore_openai.body import MAX_HEADER_BYTES, header_list, ignored_paths, parse_object
from pagedcore_openai.protocol import ChatRequest, CompletionRequest

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_a_request_error(body):  # IN-42
    with contextlib.suppress(RequestError):
        assert isinstance(parse_object(body, 128, 10**6), dict)


@given(st.dictionaries(st.text(), VALUES))
def test_an_object_is_read_as_it_was_written(value):
    assert parse_object(json.dumps(value).encode(), 128, 10**6) == json.loads(json.dumps(value))


@pytest.mark.parametrize("depth", [1, 5, 128])
def test_brackets_are_counted_from_the_outermost(depth):  # IN-16
    body = b'{"a":' * depth + b"1" + b"}" * depth
    assert parse_object(body, depth, 9)
    with pytest.raises(RequestError, match="too deeply"):
        parse_object(body, depth - 1, 9)


def test_values_are_counted_before_they_are_read():  # IN-24
    assert parse_object(b'{"a": [1, 2, 3]}', 9, 2)
    with pytest.raises(RequestError, match="at most 1 commas"):
        parse_object(b'{"a": [1, 2, 3]}', 9, 1)


@given(st.lists(st.from_regex(r"[A-Za-z0-9_.%\[\]-]{1,60}", fullmatch=True), max_size=300))
def test_a_list_of_paths_ends_at_a_whole_name(paths):  # REQ-4
    text = header_list(paths)
    assert len(text) <= MAX_HEADER_BYTES
    listed = text.split(",") if text else []
    if listed != paths:
        assert listed[-1] == "..."
        assert listed[:-1] == paths[: len(listed) - 1]


@given(st.dictionaries(st.text(), VALUES), st.sampled_from([ChatRequest, CompletionRequest]))
def test_what_is_ignored_is_sorted_and_printable(body, kind):  # REQ-3, REQ-4
    paths = ignored_paths(body, kind, strict=False)
    assert paths == sorted(paths)
    assert all(path.isascii() and path.isprintable() and "," not in path for path in paths)
