"""Prompts and conversations into what the engine takes: token ids and settled parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pagedcore.errors import ModelError, RequestError
from pagedcore.request import SamplingParams
from pagedcore.text.chat_template import ChatTemplate
from pagedcore.text.folder import read_json
from pagedcore.text.messages import checked_messages
from pagedcore.text.quoting import BREAK
from pagedcore.text.tokenizer import Tokenizer

_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Parameters that a model may bring defaults for (SAMPLE-2)."""


@dataclass(frozen=True, slots=True)
class EngineInput:
    """One prompt, ready for the engine."""

    prompt: str | None
    """The text that was asked for or rendered; None when the prompt was token ids."""

    prompt_token_ids: list[int]
    """Not empty, all in the vocabulary, shorter than the model's length."""

    params: SamplingParams
    """`max_tokens` is what fits, never None; `stop_token_ids` has the model's further EOS ids."""

    eos_token_id: int
    """The tokenizer's end-of-sequence token; -1 is none."""

    bad_words_token_ids: tuple[tuple[int, ...], ...]
    """`params.bad_words` in tokens, each with and without a leading space (SAMPLE-8)."""


@dataclass(frozen=True, slots=True)
class PooledInput:
    """One prompt that becomes a vector, or a pair of texts that becomes scores."""

    prompt: str | None
    """The text that was asked for, the second of two; None when the prompt was token ids."""

    prompt_token_ids: list[int]
    """Not empty, all in the vocabulary, at most as many as the model's length."""

    num_first: int | None = None
    """Tokens of the first of two texts, for models that tell them apart."""


class InputProcessor:
    """Turns prompts into `EngineInput`s, with the model's own defaults and limits.

    Safe to use from several threads. Both methods raise RequestError for an invalid request.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        vocab_size: int,
        generation_config: Mapping[str, Any] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """`eos_token_ids` end an output besides the tokenizer's own (STOP-2).

        `max_model_len` counts tokens of prompt and output together; `vocab_size` is the model's.
        Raises ModelError for a default of `generation_config` that is out of range.
        """
        config = generation_config or {}
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.chat_template = chat_template
        self._defaults = {k: config[k] for k in _DEFAULTED if config.get(k) is not None}
        self.default_max_tokens: int | None = config.get("max_new_tokens")
        """The model's own limit for an output, where it has one."""
        self.eos_token_id = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self._stop_ids = tuple(
            token
            for token in dict.fromkeys(eos_token_ids)
            if 0 <= token < vocab_size and token != self.eos_token_id
        )
        try:
            SamplingParams(**self._defaults, max_tokens=self.default_max_tokens)
        except RequestError as error:
            raise ModelError(
                f"generation_config.json: {error}. Correct it, or ignore it with "
                "--generation-config none."
            ) from error

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        vocab_size: int,
        generation_config: Literal["auto", "none"] = "auto",
        chat_template: str | None = None,
    ) -> Self:
        """Read a model folder's generation_config.json and chat template.

        `generation_config="none"` leaves its sampling defaults out, never its EOS ids. Without the
        file these come from config.json. `chat_template` is a template or a file that holds one.
        """
        generation = read_json(folder / "generation_config.json")
        eos = (generation or read_json(folder / "config.json")).get("eos_token_id")
        eos_ids = eos if isinstance(eos, list) else [eos]
        return cls(
            tokenizer,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            generation_config=generation if generation_config == "auto" else None,
            eos_token_ids=[token for token in eos_ids if isinstance(token, int)],
            chat_template=ChatTemplate.from_folder(
                folder, tokenizer.special_tokens, override=chat_template
            ),
        )

    def default_params(self) -> dict[str, Any]:
        """The model's own sampling parameters; a request's explicit values go over them."""
        return dict(self._defaults)

    def completion(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> EngineInput:
        """A prompt to go on with: text, or token ids that are taken as they are.

        Without `params` the model's defaults hold, and at most 16 tokens where it has none.
        `truncate_prompt_tokens=k` keeps the last k tokens of the prompt, -1 as many as fit.
        """
        if params is None:
            defaults = self.default_params()
            if self.default_max_tokens is not None:
                defaults["max_tokens"] = self.default_max_tokens
            params = SamplingParams(**defaults)
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str):
            ids = self._encode(prompt, add_special_tokens, "prompt")
        else:
            ids = _token_ids(prompt)
        return self._input(text, ids, params, truncate_prompt_tokens, "prompt")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        add_special_tokens: bool = False,
        truncate_prompt_tokens: int | None = None,
        chat_template: str | None = None,
        **template_options: Any,
    ) -> EngineInput:
        """A conversation to answer, rendered by the chat template.

        Without `params` the model's defaults hold, and the answer may be as long as the model's
        own limit or its length allow. `chat_template` is a template for this conversation only,
        never a file; only trusted callers may choose it. `template_options` go to
        `ChatTemplate.render`.
        """
        if params is None:
            params = SamplingParams(**self._defaults, max_tokens=self.default_max_tokens)
        template = self.chat_template
        if chat_template is not None:
            template = ChatTemplate(chat_template, self.tokenizer.special_tokens)
        if template is None:
            raise RequestError(
                "this model has no chat template: give one with --chat-template, or ask for a "
                "completion of plain text",
                "messages",
            )
        text = template.render(self.quoted(messages), **template_options)
        ids = self._encode(text, add_special_tokens, "messages")
        return self._input(text.replace(BREAK, ""), ids, params, truncate_prompt_tokens, "messages")

    def quoted(self, messages: object) -> list[dict[str, Any]]:
        """Checked messages, as a template may render them for `Tokenizer.encode_quoted`."""
        return self.tokenizer.quoting.quoted(checked_messages(messages))

    def pooled(
        self,
        prompt: str | Sequence[int],
        *,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
        param: str = "input",
    ) -> PooledInput:
        """A prompt that becomes a vector: text, or token ids that are taken as they are.

        It may be as long as the model's length. `truncate_prompt_tokens=k` keeps the first k
        tokens, those that are put behind a text among them; -1 as many as fit. `param` is what
        errors call it.
        """
        if not isinstance(prompt, str):
            ids, num_behind = _token_ids(prompt, param), 0
        else:
            ids = self._encode(prompt, add_special_tokens, param)
            num_behind = self.tokenizer.num_behind if add_special_tokens else 0
        ids = self._beginning(ids, truncate_prompt_tokens, num_behind)
        text = prompt if isinstance(prompt, str) else None
        return PooledInput(text, self._fitting(ids, param))

    def pair(
        self,
        first: str,
        second: str,
        *,
        truncate_prompt_tokens: int | None = None,
        param: str = "documents",
    ) -> PooledInput:
        """Two texts in one prompt, for a classifier of pairs, as the tokenizer joins them.

        `truncate_prompt_tokens` is as in `pooled`: what goes first is the end of the second text.
        """
        if not first or not second:
            raise RequestError(f"{param} must not hold an empty text", param)
        try:
            ids, num_first = self.tokenizer.encode_pair(first, second)
        except RequestError as error:
            raise RequestError(f"{param}: {error}", param) from None
        ids = self._beginning(ids, truncate_prompt_tokens, self.tokenizer.num_behind)
        return PooledInput(second, self._fitting(ids, param), num_first)

    def _beginning(self, ids: list[int], asked: int | None, num_behind: int) -> list[int]:
        """The first tokens, as many as were asked for; those behind a text stay the last."""
        if asked is None:
            return ids
        kept = self.max_model_len if asked == -1 else self._num_kept(asked)
        if len(ids) <= kept:
            return ids
        num_behind = min(num_behind, kept - 1)
        return ids[: kept - num_behind] + ids[len(ids) - num_behind :]

    def _fitting(self, ids: list[int], param: str) -> list[int]:
        self._check_ids(ids, param)
        if len(ids) > self.max_model_len:
            raise RequestError(
                f"{param} has {len(ids)} tokens; the model takes at most {self.max_model_len}: "
                "shorten it, or keep its beginning with truncate_prompt_tokens",
                param,
            )
        return ids

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        if not text:
            raise RequestError(f"{param} must not be empty", param)
        tokenizer = self.tokenizer
        encode = tokenizer.encode_quoted if param == "messages" else tokenizer.encode
        try:
            return encode(text, add_special_tokens)
        except RequestError as error:
            raise RequestError(f"{param}: {error}", param) from None

    def _input(
        self,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        truncate_prompt_tokens: int | None,
        param: str,
    ) -> EngineInput:
        if truncate_prompt_tokens is not None:
            ids = ids[-self._num_kept(truncate_prompt_tokens) :]
        self._check_ids(ids, param)
        params.check_vocabulary(self.vocab_size)
        return EngineInput(
            text,
            ids,
            self._settled(params, len(ids), param),
            self.eos_token_id,
            self._bad_words(params.bad_words),
        )

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        if not ids:
            raise RequestError(f"{param} must have at least one token", param)
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"{param} holds token id {token}, outside 0..{self.vocab_size - 1}", param
                )

    def _num_kept(self, asked: int) -> int:
        if isinstance(asked, bool) or not isinstance(asked, int) or (asked < 1 and asked != -1):
            raise RequestError(
                f"truncate_prompt_tokens must be at least 1, or -1 for what fits, not {asked!r}",
                "truncate_prompt_tokens",
            )
        return max(1, self.max_model_len - 1) if asked == -1 else asked

    def _settled(self, params: SamplingParams, num_prompt: int, param: str) -> SamplingParams:
        """Parameters with `max_tokens` cut to what fits, and the model's further EOS ids."""
        room = self.max_model_len - num_prompt
        if room < 1:
            wanted = "any" if params.max_tokens is None else params.max_tokens
            raise RequestError(
                f"{param} has {num_prompt} tokens and max_tokens is {wanted}, but prompt and "
                f"output share the model's length of {self.max_model_len} tokens: shorten the "
                "prompt, or keep its end with truncate_prompt_tokens",
                param,
            )
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        stop_ids = tuple(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids = tuple(dict.fromkeys(stop_ids + self._stop_ids))
        if (max_tokens, stop_ids) == (params.max_tokens, params.stop_token_ids):
            return params
        return replace(params, max_tokens=max_tokens, stop_token_ids=stop_ids)

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            spellings = self._spellings(word)
            if not spellings:
                raise RequestError(f"bad_words: {word!r} has no tokens in this model", "bad_words")
            found.update(dict.fromkeys(spellings))
        return tuple(found)

    def _spellings(self, word: str) -> list[tuple[int, ...]]:
        """The ways a word can be written in tokens.

        Besides the word and " word" themselves these are taken from after a line break: a
        SentencePiece tokenizer puts a space of its own before the start of a text.
        """
        found: list[tuple[int, ...]] = []
        newline = self._encode("\n", False, "bad_words")
        bare = word.lstrip(" ") or word
        for text in (bare, f" {bare}"):
            found.append(tuple(self._encode(text, False, "bad_words")))
            after = self._encode(f"\n{text}", False, "bad_words")
            if newline and after[: len(newline)] == newline:
                found.append(tuple(after[len(newline) :]))
        return [ids for ids in found if ids]


def _token_ids(prompt: Sequence[int], param: str = "prompt") -> list[int]:
    ids = list(prompt)
    if not set(map(type, ids)) <= {int}:
        raise RequestError(f"{param} must be text or a list of token ids (integers)", param)
    return ids
