"""Output tokens into text, one token at a time (semantics 4.2)."""

from collections.abc import Sequence

from pagedcore.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
"""What decoding gives for bytes that are no character, or not one yet."""

_CONTEXT = 8
"""Tokens decoded again before new ones: a decoder treats the first one's space specially, and
eight tokens are at least eight bytes, more than the longest character."""

_MAX_PENDING = 32
"""Tokens without new text after which the window moves on, or each would cost more (DETOK-10)."""


class Detokenizer:
    """The text that an output adds to its prompt.

    The joined pieces equal one decode of prompt and output, less the decoded prompt (DETOK-1).
    One thing differs by design: where a run of byte-fallback tokens turns invalid, one decode
    takes back the characters before that in the run, and a stream cannot.

    `tokenizers.decoders.DecodeStream` does the same for valid text. It is not used because its
    window grows, and each token's cost with it, for as long as bytes stay invalid or tokens are
    skipped, both of which a request can arrange; because it fails on a run that turns invalid;
    and because what it holds back cannot be read at the end (DETOK-2).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._join_special = not spaces_between_special_tokens
        self._after_special = False
        self._window = self._end_of(prompt_token_ids)
        self._num_sent = len(self._window)
        self._sent = self._decode(self._window)

    def step(self, token_id: int) -> str:
        """Take a token; the text that is certain now, and was not before."""
        if self._tokenizer.is_silent(token_id, skip_special_tokens=self._skip):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        incomplete = text.endswith(_REPLACEMENT)
        if incomplete or text == self._sent:
            if len(self._window) - self._num_sent < _MAX_PENDING:
                return ""
            return self._cut(text)
        piece = self._added(text)
        new = self._window[self._num_sent :]
        sent = self._decode(new)
        if _REPLACEMENT in sent and _REPLACEMENT not in text:
            new, sent = self._window, text  # the prompt ended within the character that new ends
        self._window, self._num_sent, self._sent = new, len(new), sent
        return self._joined(piece, token_id) if self._join_special else piece

    def steps(self, token_ids: Sequence[int]) -> str:
        """The same as `step` for each of them, joined: nearly always at the cost of one decode."""
        if len(token_ids) >= _CONTEXT and not self._join_special:
            piece = self._step_at_once(token_ids)
            if piece is not None:
                return piece
        return "".join(map(self.step, token_ids))

    def _step_at_once(self, token_ids: Sequence[int]) -> str | None:
        """The text of many tokens by one decode; None where some bytes are no character (yet)."""
        text = self._decode([*self._window, *token_ids])
        if _REPLACEMENT in text or not text.startswith(self._sent):
            return None
        piece = text[len(self._sent) :]
        recent = self._audible(token_ids[-4 * _CONTEXT :])
        if len(recent) < _CONTEXT + 3:
            recent = self._audible([*self._window, *token_ids])
        for length in range(_CONTEXT, _CONTEXT + 4):  # one of them begins with a character
            self._window = recent[-length:]
            self._sent = self._decode(self._window)
            if _REPLACEMENT not in self._sent:
                break
        self._num_sent = len(self._window)
        return piece

    def _audible(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens that add to a text."""
        silent, skip = self._tokenizer.is_silent, self._skip
        return [token for token in token_ids if not silent(token, skip_special_tokens=skip)]

    def pending(self) -> str:
        """What is held back, as decoded: the end of the text if no token follows."""
        return self._added(self._decode(self._window))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens, as many as it takes to have text before the output."""
        length = _CONTEXT
        while True:
            end = self._audible(prompt[-length:])
            if length >= len(prompt) or self._decode(end):
                return end
            length *= 4

    def _added(self, text: str) -> str:
        """What `text`, the decoded window, has beyond what was sent."""
        if text.startswith(self._sent):
            return text[len(self._sent) :]
        whole = self._sent.rstrip(_REPLACEMENT)  # the prompt may end within a character
        if text.startswith(whole):
            return text[len(whole) :]
        return self._decode(self._window[self._num_sent :])

    def _cut(self, text: str) -> str:
        """Send all but the last character, which may still be completed, and move on."""
        piece = self._added(text).removesuffix(_REPLACEMENT)
        self._window = self._window[-_CONTEXT:]
        self._num_sent = len(self._window)
        self._sent = self._decode(self._window).removesuffix(_REPLACEMENT)
        return piece

    def _joined(self, piece: str, token_id: int) -> str:
        """Drop the space that a decoder puts between one special token and the next."""
        special = token_id in self._tokenizer.special_ids
        if special and self._after_special:
            piece = piece.lstrip(" ")
        self._after_special = special
        return piece
