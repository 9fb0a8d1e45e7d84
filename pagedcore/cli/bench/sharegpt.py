"""Requests out of a file of chats in the layout of ShareGPT, which the user brings."""

import itertools
import json
import logging
import random
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pagedcore.cli.bench.synthetic import LEAST_LEN, MOST_PROMPT, MOST_TOTAL, Ask, suits
from pagedcore.errors import ConfigError, PagedcoreError
from pagedcore.plugins import collect, load_plugins
from pagedcore.sources import find_model
from pagedcore.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def read_chats(path: Path) -> list[tuple[str, str]]:
    """The first prompt and the first answer of each chat that has both.

    The file is a JSON list of `{"conversations": [{"value": ...}, {"value": ...}, ...]}`. Raises
    ConfigError where it is not.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read dataset_path {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"dataset_path {path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ConfigError(f"dataset_path {path} must hold a JSON list of chats")
    chats = [chat for entry in entries if (chat := _first_turns(entry)) is not None]
    if not chats:
        raise ConfigError(
            f"dataset_path {path} holds no chat of two turns: a chat is an object whose "
            "`conversations` is a list of objects with a text `value`"
        )
    return chats


def sharegpt_requests(
    chats: list[tuple[str, str]],
    num_prompts: int,
    count_tokens: Callable[[str], int],
    *,
    output_len: int | None,
    seed: int,
    shuffle: bool,
) -> list[Ask]:
    """The first `num_prompts` chats that are neither too short nor too long, in random order.

    An answer shall have as many tokens as the one in the file, or `output_len`. Where too few
    chats suit, they are asked again, with a warning. Raises ConfigError where none does.
    """
    if output_len is not None and output_len < 1:
        raise ConfigError(f"sharegpt_output_len must be at least 1, not {output_len}")
    if shuffle:
        chats = random.Random(seed).sample(chats, len(chats))

    def suitable() -> Iterator[Ask]:
        for prompt, answer in chats:
            length = count_tokens(answer) if output_len is None else output_len
            if suits(count_tokens(prompt), length, answer_is_given=output_len is not None):
                yield Ask(prompt, length)

    found = list(itertools.islice(suitable(), num_prompts))
    if not found:
        raise ConfigError(
            f"no chat of dataset_path suits: a prompt has {LEAST_LEN} to {MOST_PROMPT} tokens, and "
            f"with its answer at most {MOST_TOTAL}"
        )
    if len(found) < num_prompts:
        logger.warning(
            "%d prompts were asked for, and %d chats suit: they are asked several times",
            num_prompts,
            len(found),
        )
    return list(itertools.islice(itertools.cycle(found), num_prompts))


def _first_turns(entry: Any) -> tuple[str, str] | None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    prompt, answer = texts
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return None
    return prompt, answer


class TokenCounter:
    """Counts tokens of text with the tokenizer of a folder, or of a model by its name.

    It is looked up at the first text; raises ConfigError where there is none.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, text: str) -> int:
        """Tokens of a text, with those that the tokenizer adds."""
        return len(self._tokenizer.encode(text))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        try:
            sources = collect(load_plugins(), "pagedcore_sources")
            return Tokenizer.from_folder(find_model(self.name, sources, holding="tokenizer.json"))
        except PagedcoreError as error:
            raise ConfigError(
                f"lengths of chats are counted in tokens, and {self.name!r} leads to no tokenizer; "
                f"name a folder or a model with --tokenizer. {error}"
            ) from None
