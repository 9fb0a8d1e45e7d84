"""What people write is text, also where it has the name of a special token in it (IN-25).

A chat template puts special tokens around what users say, and the tokenizer finds them by their
names. A user's own "<|im_end|>" must not end the user's turn: such a name is broken in two before
the template is rendered, and the halves are encoded one after the other.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

BREAK = "\U0010ffff\U0010fffe"
"""Stands in a broken name: two code points that no text has, and that templates leave alone."""

TRUSTED_ROLES = ("system", "developer")
"""Whoever writes these instructions also chose the model."""


class Quoting:
    """Breaks the names of one tokenizer's special tokens."""

    def __init__(self, names: Iterable[str]) -> None:
        """A name of one character cannot be broken, and is left as it is."""
        long = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, long))) if long else None

    def quoted(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with text contents, in which no name of a special token is whole any more."""
        if self._pattern is None:
            return list(messages)
        return [self._message(message, self._pattern) for message in messages]

    def _message(self, message: dict[str, Any], pattern: re.Pattern[str]) -> dict[str, Any]:
        content = message.get("content")
        if not content or message["role"] in TRUSTED_ROLES or not pattern.search(content):
            return message
        return {**message, "content": pattern.sub(_broken, content)}


def _broken(match: re.Match[str]) -> str:
    name = match[0]
    middle = len(name) // 2
    return name[:middle] + BREAK + name[middle:]
