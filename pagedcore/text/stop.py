"""Find stop strings in text that arrives in pieces (semantics DETOK-3 to DETOK-6)."""

from collections.abc import Sequence
from typing import NamedTuple


class Match(NamedTuple):
    """A stop string that is complete."""

    stop: str
    """The string."""

    begin: int
    """Where it begins, in characters from the start of the retained text."""

    end: int
    """Where it ends."""


class StopStrings:
    """Searches generated text for the first of `stop` to be completed.

    Without `include`, the last `max(len(stop)) - 1` characters are held back: they may turn out
    to be the beginning of a match.
    """

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        self._stop = stop
        self._include = include
        self._keep = max(map(len, stop)) - 1
        self._recent = ""  # the end of the text so far; held back unless include

    def find(self, text: str) -> Match | None:
        """The match that `text` would complete; of several the first to end, then in list order."""
        retained = self._recent + text
        best: Match | None = None
        for stop in self._stop:
            # From here on a match ends in the new text.
            begin = retained.find(stop, max(0, len(self._recent) - len(stop) + 1))
            if begin >= 0 and (best is None or begin + len(stop) < best.end):
                best = Match(stop, begin, begin + len(stop))
        return best

    def push(self, text: str, *, may_match: bool = True) -> tuple[str, str | None]:
        """Take new text; the text to send and the stop string that ends it, if one does.

        `may_match` is false for text of the first `min_tokens` tokens (DETOK-4). After a match
        the rest is dropped and nothing may be pushed.
        """
        match = self.find(text) if may_match else None
        num_recent = len(self._recent)
        retained = self._recent + text
        if match is not None:
            self._recent = ""
            sent = retained[num_recent : match.end] if self._include else retained[: match.begin]
            return sent, match.stop
        cut = max(0, len(retained) - self._keep)
        self._recent = retained[cut:]
        return (text if self._include else retained[:cut]), None

    def flush(self) -> str:
        """What is held back, at the end."""
        held, self._recent = self._recent, ""
        return "" if self._include else held
