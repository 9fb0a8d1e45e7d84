"""What a benchmark asks: the flags of data sets, and requests by the name of one."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pagedcore.cli.bench.sharegpt import read_chats, sharegpt_requests
from pagedcore.cli.bench.synthetic import (
    Ask,
    chat_like_requests,
    random_requests,
    repeated_prefixes,
)
from pagedcore.cli.flags import take
from pagedcore.errors import ConfigError

Name = Literal["random", "sharegpt", "sharegpt_like", "prefix_repetition"]

_CHATS = ("sharegpt", "sharegpt_like")
_OF = {
    "input_len": ("random",),
    "random_input_len": ("random",),
    "random_output_len": ("random",),
    "random_range_ratio": ("random",),
    "random_prefix_len": ("random",),
    "random_vocab_size": ("random", "sharegpt_like", "prefix_repetition"),
    "dataset_path": ("sharegpt",),
    "tokenizer": ("sharegpt",),
    "sharegpt_output_len": _CHATS,
    "prefix_repetition_prefix_len": ("prefix_repetition",),
    "prefix_repetition_suffix_len": ("prefix_repetition",),
    "prefix_repetition_num_prefixes": ("prefix_repetition",),
    "prefix_repetition_output_len": ("prefix_repetition",),
    "disable_shuffle": ("sharegpt", "prefix_repetition"),
}
"""Data sets that a flag belongs to; the others belong to all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What is asked."""

    dataset_name: Name = "random"
    """`random` tokens; chats of a file (`sharegpt`); random tokens with lognormal lengths, as
    uneven as those of chats (`sharegpt_like`); random tokens behind a few prefixes
    (`prefix_repetition`)."""

    dataset_path: str | None = None
    """JSON file in the layout of ShareGPT, for `sharegpt`."""

    tokenizer: str | None = None
    """Folder or name of the tokenizer that counts the tokens of chats; by default the model's."""

    num_prompts: int = 1000
    """Requests."""

    disable_shuffle: bool = False
    """Keep chats in the order of their file, and prompts of one prefix together."""

    input_len: int | None = None
    """The same as `random_input_len`."""

    output_len: int | None = None
    """Tokens of an answer, for every data set; chats have answers as long as the file's without."""

    random_input_len: int = 1024
    """Tokens of a prompt, before `random_range_ratio`."""

    random_output_len: int = 128
    """Tokens of an answer, before `random_range_ratio`."""

    random_range_ratio: float = 0.0
    """Lengths vary by up to this share, in [0, 1)."""

    random_prefix_len: int = 0
    """Tokens that all prompts begin with, on top of their own."""

    random_vocab_size: int = 10000
    """Random prompts are made of token ids below this."""

    sharegpt_output_len: int | None = None
    """Tokens of an answer, in place of those in the file, or of those drawn."""

    prefix_repetition_prefix_len: int = 256
    """Tokens of a prefix."""

    prefix_repetition_suffix_len: int = 256
    """Tokens of a prompt behind its prefix."""

    prefix_repetition_num_prefixes: int = 10
    """Prefixes; each begins as many prompts as any other."""

    prefix_repetition_output_len: int = 128
    """Tokens of an answer."""

    def __post_init__(self) -> None:
        if self.dataset_name == "sharegpt" and self.dataset_path is None:
            raise ConfigError(
                "the data set 'sharegpt' needs a file: name it with --dataset-path, or take "
                "--dataset-name sharegpt_like, which draws lengths like those of chats"
            )
        for name in ("num_prompts", "random_vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

    def requests(
        self, *, seed: int, vocab_size: int, count_tokens: Callable[[str], int]
    ) -> list[Ask]:
        """Make them; the same for the same seed. `count_tokens` is called for chats of a file.

        Raises ConfigError for lengths and numbers that make no sense.
        """
        num, shuffle = self.num_prompts, not self.disable_shuffle
        common = dict(vocab_size=vocab_size, seed=seed)
        if self.dataset_name == "sharegpt":
            assert self.dataset_path is not None
            chats, length = read_chats(Path(self.dataset_path)), self._chat_len
            return sharegpt_requests(
                chats, num, count_tokens, output_len=length, seed=seed, shuffle=shuffle
            )
        if self.dataset_name == "sharegpt_like":
            return chat_like_requests(num, output_len=self._chat_len, **common)
        if self.dataset_name == "prefix_repetition":
            return repeated_prefixes(
                num,
                prefix_len=self.prefix_repetition_prefix_len,
                suffix_len=self.prefix_repetition_suffix_len,
                num_prefixes=self.prefix_repetition_num_prefixes,
                output_len=_first(self.output_len, self.prefix_repetition_output_len),
                shuffle=shuffle,
                **common,
            )
        return random_requests(
            num,
            input_len=_first(self.input_len, self.random_input_len),
            output_len=_first(self.output_len, self.random_output_len),
            range_ratio=self.random_range_ratio,
            prefix_len=self.random_prefix_len,
            **common,
        )

    @property
    def _chat_len(self) -> int | None:
        return self.sharegpt_output_len if self.output_len is None else self.output_len


def take_dataset(options: dict[str, Any], skip: Collection[str] = ()) -> Dataset:
    """Remove the options of a data set, but those to `skip`, and make it.

    Raises ConfigError for an option that the chosen data set does not look at.
    """
    given = take(options, Dataset, skip)
    dataset = Dataset(**given)
    for name in given:
        if dataset.dataset_name not in _OF.get(name, get_args(Name)):
            flag, owners = name.replace("_", "-"), " and ".join(map(repr, _OF[name]))
            raise ConfigError(
                f"--{flag} is for {owners}, and the data set is {dataset.dataset_name!r}: "
                "leave it out, or choose another --dataset-name"
            )
    return dataset


def _first(value: int | None, other: int) -> int:
    return other if value is None else value
