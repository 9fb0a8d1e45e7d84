"""Responses are kept within bounds, and seen by their owners only."""

import pytest

from pagedcore_openai import response_store
from pagedcore_openai.errors import ApiError
from pagedcore_openai.response_store import ResponseStore, StoredResponse


def stored(name, key=b"key", text=""):
    return StoredResponse(key, {"id": name}, [{"role": "user", "content": text}])


def test_only_the_key_that_made_it_finds_a_response():
    store = ResponseStore()
    store.add(stored("a"))
    assert store.find("a", b"key").body == {"id": "a"}
    for name, key in (("a", b"other"), ("b", b"key")):
        with pytest.raises(ApiError) as raised:
            store.find(name, key)
        assert raised.value.status == 404


def test_the_oldest_is_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(response_store, "MAX_RESPONSES", 2)
    store = ResponseStore()
    for name in "abc":
        store.add(stored(name))
    with pytest.raises(ApiError):
        store.find("a", b"key")
    assert store.find("b", b"key")
    assert store.find("c", b"key")


def test_the_oldest_is_forgotten_when_there_is_too_much_text(monkeypatch):
    monkeypatch.setattr(response_store, "MAX_CHARACTERS", 100)
    store = ResponseStore()
    store.add(stored("a", text="x" * 60))
    store.add(stored("b", text="x" * 60))
    with pytest.raises(ApiError):
        store.find("a", b"key")
    assert store.find("b", b"key")


def test_what_was_removed_is_gone():
    store = ResponseStore()
    store.add(stored("a"))
    store.remove("a", b"key")
    with pytest.raises(ApiError):
        store.remove("a", b"key")
