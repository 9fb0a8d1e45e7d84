"""A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json.

GGUF keeps a vocabulary, merges or scores, and the name of a way to cut text into words. What
these names mean is in llama.cpp's llama-vocab.cpp; what is built for them here is what the
models' own tokenizer.json holds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from pagedcore.sources.gguf_config import Metadata
from pagedcore.sources.gguf_reader import GgufFile

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Values of `tokenizer.ggml.token_type` for tokens that no merge makes."""
MAX_PIECE = 64
"""Most characters of a token that pieces are merged into; SentencePiece makes none above 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """How one family cuts text into words, within which bytes are merged."""

    first: Any = None
    """What cuts the text before it becomes bytes."""
    gpt2_pattern: bool = False
    """Whether GPT-2's pattern cuts it then."""
    nfc: bool = False
    """Whether text is composed first (Unicode's form C)."""
    whole_words: bool = False
    """Whether a word in the vocabulary is that token, whatever the merges make of it."""
    add_bos: bool = False
    """Whether BOS begins a text when the file does not say."""


def _split(numbers: str) -> pre_tokenizers.PreTokenizer:
    """The pattern of GPT-4 and its descendants; they differ in how many digits make a word."""
    return pre_tokenizers.Split(
        Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
            + numbers
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "isolated",
    )


_LLAMA3 = _Words(first=_split(r"\p{N}{1,3}"), whole_words=True, add_bos=True)
_WORDS = {
    "gpt-2": _Words(gpt2_pattern=True),
    "smollm": _Words(first=pre_tokenizers.Digits(individual_digits=True), gpt2_pattern=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Words(first=_split(r"\p{N}"), nfc=True),
    "deepseek-r1-qwen": _Words(first=_split(r"\p{N}")),
}
"""By `tokenizer.ggml.pre`."""


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`.

    Raises ModelError when the file holds no tokenizer, one of a kind that is not read, or one
    whose parts disagree.
    """
    metadata = Metadata(file)
    kind = metadata.require("tokenizer.ggml.model", str)
    tokens = metadata.tokens()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise metadata.error(f"has the token {twice[:60]!r} twice")
    roles = _roles(metadata, tokens)
    if kind == "gpt2":
        words = _words(metadata)
        tokenizer = _byte_bpe(metadata, vocabulary, words)
        add_bos = words.add_bos
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata, vocabulary, roles.get("unk_token"))
        add_bos = True
    else:
        raise metadata.error(f"has the tokenizer {kind!r}, and those read are gpt2 and llama")
    _add_tokens(metadata, tokenizer, tokens)

    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bool, add_bos) and "bos_token" in roles
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", bool, False) and "eos_token" in roles
    before = [roles["bos_token"]] if add_bos else []
    after = [roles["eos_token"]] if add_eos else []
    if before or after:
        try:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", *after, *before, "$B:1", *after],
                special_tokens=[(token, vocabulary[token]) for token in {*before, *after}],
            )
        except ValueError as error:
            raise metadata.error(f"has an odd BOS or EOS token ({error})") from error
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    template = metadata.get("tokenizer.chat_template", str)
    if template is not None:
        config["chat_template"] = template
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _words(metadata: Metadata) -> _Words:
    name = metadata.require("tokenizer.ggml.pre", str)
    if name not in _WORDS:
        known = ", ".join(sorted(_WORDS))
        raise metadata.error(f"cuts text into words by {name!r}, and those known are {known}")
    return _WORDS[name]


def _byte_bpe(metadata: Metadata, vocabulary: Mapping[str, int], words: _Words) -> Tokenizer:
    """BPE over bytes, as GPT-2 has it."""
    merges = []
    for merge in metadata.require("tokenizer.ggml.merges", list):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise metadata.error(f"has the merge {merge[:60]!r}, which is not of two pieces")
        merges.append((left, right))
    tokenizer = _bpe(metadata, vocabulary, merges, ignore_merges=words.whole_words)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.gpt2_pattern)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([words.first, byte_level]) if words.first else byte_level
    )
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(
    metadata: Metadata, vocabulary: Mapping[str, int], unknown: str | None
) -> Tokenizer:
    """SentencePiece's BPE, as Llama 1 and 2 have it: spaces are "\u2581", the rest falls to bytes.

    It has scores in place of merges: of two neighbours that make a token, those that make the one
    of the highest score are merged first.
    """
    scores = _per_token(metadata, "scores", len(vocabulary), np.floating)
    if scores is None:
        raise metadata.error("lacks the metadata 'tokenizer.ggml.scores'")
    ranked = []
    for token, token_id in vocabulary.items():
        if len(token) > MAX_PIECE:
            continue  # stands for itself in a text, and is not made of pieces
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                order = (-scores[token_id], vocabulary[left], vocabulary[right])
                ranked.append((order, (left, right)))
    ranked.sort()
    tokenizer = _bpe(
        metadata,
        vocabulary,
        [merge for _, merge in ranked],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    space = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", bool, True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _bpe(
    metadata: Metadata,
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    **options: Any,
) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges), **options))
    except Exception as error:  # the library raises Exception itself
        raise metadata.error(f"has a tokenizer that cannot be built ({error})") from error


def _add_tokens(metadata: Metadata, tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Mark the tokens that stand for themselves in a text; control tokens are special."""
    types = _per_token(metadata, "token_type", len(tokens), np.integer)
    if types is None:
        return
    tokenizer.add_tokens(
        [
            AddedToken(tokens[i], normalized=False, special=bool(types[i] != USER_DEFINED))
            for i in np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED)))
            if tokens[i]
        ]
    )


def _per_token(
    metadata: Metadata, name: str, count: int, kind: type[np.floating[Any]] | type[np.integer[Any]]
) -> npt.NDArray[Any] | None:
    """An array that has one number for each token, or None where the file has none."""
    key = f"tokenizer.ggml.{name}"
    values: npt.NDArray[Any] | None = metadata.get(key, np.ndarray)
    if values is not None and (len(values) != count or not np.issubdtype(values.dtype, kind)):
        raise metadata.error(
            f"has {len(values)} {values.dtype} in {key!r}, not one {kind.__name__} for each of "
            f"{count} tokens"
        )
    return values


def _roles(metadata: Metadata, tokens: Sequence[str]) -> dict[str, str]:
    """The tokens that have a part to play, by the name that Hugging Face has for it."""
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {name: metadata.token_id(role) for name, role in roles.items()}
    return {name: tokens[token_id] for name, token_id in found.items() if token_id is not None}
