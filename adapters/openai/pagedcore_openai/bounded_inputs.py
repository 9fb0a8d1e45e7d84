"""Texts that can never fit are refused by their length, before they are tokenised (IN-24)."""

from functools import cached_property

from pagedcore.errors import RequestError
from pagedcore.text.inputs import InputProcessor

_SLACK = 4
"""A text may be so many times longer than the longest tokens would make it: a normalizer may join
characters, and the end of a text may be asked for."""


class BoundedInputs(InputProcessor):
    """An InputProcessor that knows how long a text can be."""

    @cached_property
    def max_characters(self) -> int:
        """Longest text that is tokenised at all."""
        token_bytes = self.tokenizer.token_bytes
        longest = max(len(token_bytes(token)) for token in range(self.tokenizer.vocab_size))
        return _SLACK * longest * self.max_model_len

    def check_characters(self, count: int, param: str) -> None:
        """Raise RequestError for a text of so many characters that it cannot fit."""
        if count <= self.max_model_len:  # the common case, without looking at the vocabulary
            return
        if count > self.max_characters:
            raise RequestError(
                f"{param} has {count} characters; at most {self.max_characters} can fit into the "
                f"model's length of {self.max_model_len} tokens: shorten it",
                param,
            )
