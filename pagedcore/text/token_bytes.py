"""The bytes that one token stands for, which need not be whole characters."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Undoes a vocabulary's spelling of bytes and spaces, token by token.

    Byte-level vocabularies write each byte as a printable character (GPT-2, "Language Models are
    Unsupervised Multitask Learners", section 2.2); SentencePiece ones write a space as U+2581 and
    a byte that no piece covers as `<0xE2>`. Tokens of any other kind are decoded on their own.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = {i: t.content for i, t in backend.get_added_tokens_decoder().items()}
        decoder = backend.decoder
        decoders = list(_flat(json.loads(decoder.__getstate__()))) if decoder else []
        kinds = {decoder["type"] for decoder in decoders}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._space = next(filter(None, map(_space_mark, decoders)), None)

    def __call__(self, token_id: int) -> bytes:
        """The bytes of a token; empty for an id that is not in the vocabulary."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if not token:
            return b""
        if self._byte_level:
            values = _byte_values()
            if all(char in values for char in token):
                return bytes(values[char] for char in token)
            return token.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._space:
            return token.replace(self._space, " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()


def _flat(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        for inner in decoder["decoders"]:
            yield from _flat(inner)
    else:
        yield decoder


def _space_mark(decoder: Mapping[str, Any]) -> str | None:
    """What a decoder turns into a space, if it does."""
    if decoder["type"] == "Metaspace":
        return str(decoder["replacement"])
    if decoder["type"] == "Replace" and decoder["content"] == " ":
        mark = decoder["pattern"].get("String")
        return None if mark is None else str(mark)
    return None


@cache
def _byte_values() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary.

    Printable characters of Latin-1 stand for themselves, the other bytes in order for the
    characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
