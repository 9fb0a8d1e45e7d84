"""A model's tokenizer: text to token ids and back, over the `tokenizers` library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import AddedToken

from pagedcore.errors import ModelError, RequestError
from pagedcore.text.folder import read_json
from pagedcore.text.quoting import BREAK, Quoting
from pagedcore.text.token_bytes import TokenBytes

_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class Tokenizer:
    """What tokenizer.json says, with the special tokens of the files beside it.

    Safe to use from several threads.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        *,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ) -> None:
        """Take over `backend`.

        `special_tokens` go by role (`bos_token`, `eos_token`, ...). `add_bos` and `add_eos` say
        whether encoding puts these around a text; None leaves it to the backend.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        self.bos_token_id = self._id_of(self.bos_token)
        self.eos_token_id = self._id_of(self.eos_token)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.quoting = Quoting(token.content for token in added.values() if token.special)
        """Keeps what people write from being taken for special tokens."""
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._token_bytes = TokenBytes(backend)
        self._prefix, self._suffix = self._affixes(add_bos, add_eos)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read tokenizer.json, tokenizer_config.json and special_tokens_map.json.

        Raises ModelError when tokenizer.json is missing, or when any of them is broken.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json, the only tokenizer format that is read. Write "
                "one with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...), "
                "or name another folder with --tokenizer."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise ModelError(f"{path} cannot be read: {error}. Fetch the model again.") from error
        config = read_json(folder / "tokenizer_config.json")
        _add_tokens(backend, config.get("added_tokens_decoder") or {}, folder)
        roles = read_json(folder / "special_tokens_map.json") | config
        return cls(
            backend,
            _special_tokens(roles),
            add_bos=config.get("add_bos_token"),
            add_eos=config.get("add_eos_token"),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text; names of special tokens in it become those tokens.

        Raises RequestError for a text that has no UTF-8 form.
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise RequestError(
                "text must be valid Unicode, without unpaired surrogates (U+D800..U+DFFF)"
            ) from None
        return self._prefix + ids + self._suffix if add_special_tokens else ids

    def encode_quoted(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The same for a text that was made of what `quoting` has quoted."""
        if BREAK not in text:
            return self.encode(text, add_special_tokens)
        ids = [i for piece in text.split(BREAK) for i in self.encode(piece, False)]
        return self._prefix + ids + self._suffix if add_special_tokens else ids

    @property
    def num_behind(self) -> int:
        """Tokens that `encode` puts behind a text."""
        return len(self._suffix)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], int | None]:
        """The token ids of two texts in one prompt, with the special tokens around them.

        With them, how many are of the first text, for tokenizers that give the second another
        type. Raises RequestError for a text that has no UTF-8 form.
        """
        try:
            pair = self._backend.encode(first, second)
        except TypeError:
            raise RequestError(
                "text must be valid Unicode, without unpaired surrogates (U+D800..U+DFFF)"
            ) from None
        types = pair.type_ids
        return pair.ids, types.index(1) if 1 in types else None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary add nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, with its leading space; empty for an unknown id."""
        return self._token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """One token as log-probabilities show it: what is no whole character is U+FFFD."""
        return self._token_bytes(token_id).decode(errors="replace")

    def is_silent(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether a token adds nothing to any text it stands in."""
        if skip_special_tokens and token_id in self.special_ids:
            return True
        return not self._backend.id_to_token(token_id)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def _affixes(self, add_bos: bool | None, add_eos: bool | None) -> tuple[list[int], list[int]]:
        """The ids that the post-processor, or else the two settings, put around a text."""
        text = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a").ids
        starts = (i for i in range(len(whole)) if text and whole[i : i + len(text)] == text)
        at = next(starts, len(whole))  # a vocabulary without the letter: all of it is prefix
        prefix, suffix = whole[:at], whole[at + len(text) :]
        bos, eos = self.bos_token_id, self.eos_token_id
        if bos is not None and add_bos is not None and (bos in prefix) != add_bos:
            prefix = [bos, *prefix] if add_bos else [i for i in prefix if i != bos]
        if eos is not None and add_eos is not None and (eos in suffix) != add_eos:
            suffix = [*suffix, eos] if add_eos else [i for i in suffix if i != eos]
        return prefix, suffix


def _special_tokens(roles: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; a file gives each as a string or as an object with `content`."""
    found: dict[str, str] = {}
    for role, value in roles.items():
        token = value.get("content") if isinstance(value, Mapping) else value
        if role.endswith("_token") and isinstance(token, str):
            found[role] = token
    return found


def _add_tokens(
    backend: tokenizers.Tokenizer, declared: Mapping[str, Mapping[str, Any]], folder: Path
) -> None:
    """Add the tokens of tokenizer_config.json that tokenizer.json lacks or describes otherwise."""
    path = folder / "tokenizer_config.json"
    try:
        tokens = sorted(
            (
                (int(key), AddedToken(**{k: value[k] for k in _TOKEN_FIELDS if k in value}))
                for key, value in declared.items()
            ),
            key=lambda item: item[0],
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: added_tokens_decoder is malformed: {error}.") from error
    present = backend.get_added_tokens_decoder()
    for token_id, token in tokens:
        known = present.get(token_id)
        if known is not None and (known.content, known.special) == (token.content, token.special):
            continue
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])
        if backend.token_to_id(token.content) != token_id:
            raise ModelError(
                f"{path} gives token {token.content!r} the id {token_id}, but with tokenizer.json "
                f"it is {backend.token_to_id(token.content)}: the two are not of one model."
            )
