"""Responses that can be asked for again, for as long as there is room; in this process only."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from pagedcore_openai.errors import ApiError

MAX_RESPONSES = 1024
MAX_CHARACTERS = 32 << 20
"""How much text is kept in all; the oldest is forgotten first."""


@dataclass(slots=True)
class StoredResponse:
    """One response, and what a later one may go on from."""

    key: bytes
    """The digest of the key that made it: others cannot see it."""

    body: dict[str, Any]
    """The response object; replaced whenever it changes."""

    messages: list[dict[str, Any]]
    """The conversation so far, without instructions; the answer is its last message."""

    task: asyncio.Task[None] | None = None
    """What works on it in the background."""

    @property
    def num_characters(self) -> int:
        """How much room it takes."""
        return sum(len(str(message.get("content"))) for message in self.messages)


class ResponseStore:
    """Stored responses by id."""

    def __init__(self) -> None:
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()

    def add(self, stored: StoredResponse) -> None:
        """Keep a response, and forget the oldest that are over where there is no room."""
        self._stored[stored.body["id"]] = stored
        over = [i for i, s in self._stored.items() if s.task is None or s.task.done()]
        room = MAX_CHARACTERS - sum(s.num_characters for s in self._stored.values())
        for response_id in over:
            if len(self._stored) <= MAX_RESPONSES and room >= 0:
                break
            room += self._stored.pop(response_id).num_characters

    def find(self, response_id: str, key: bytes, param: str | None = None) -> StoredResponse:
        """The response that the owner of `key` made; raises ApiError 404."""
        stored = self._stored.get(response_id)
        if stored is None or stored.key != key:
            raise ApiError(
                404,
                f"there is no response `{response_id[:100]}`: it was not stored, or is forgotten",
                param,
            )
        return stored

    def remove(self, response_id: str, key: bytes) -> None:
        """Forget a response; raises ApiError 404."""
        stored = self.find(response_id, key)
        if stored.task is not None:
            stored.task.cancel()
        del self._stored[response_id]
