"""Log-probabilities in the shapes of chat, completions and prompts (semantics STREAM-9)."""

from collections.abc import Iterable, Sequence
from typing import Any

from pagedcore.step import TokenLogprobs
from pagedcore.text.tokenizer import Tokenizer

LEAST = -9999.0
"""What stands for minus infinity, which JSON has no number for."""

Entry = tuple[int, float, int]
"""A token, its log-probability and its rank."""


def entries_of(logprobs: TokenLogprobs) -> list[Entry]:
    """The token itself, then the most likely ones."""
    values = (max(value, LEAST) for value in logprobs.logprobs.tolist())
    return list(zip(logprobs.token_ids.tolist(), values, logprobs.ranks.tolist(), strict=True))


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Iterable[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """`{"content": [...]}`, one element per token, with the `num_top` most likely in each."""
    content = []
    for position in logprobs:
        entries = entries_of(position)
        own = _chat_entry(tokenizer, entries[0])
        likely = sorted(entries, key=lambda entry: entry[2])[:num_top]
        own["top_logprobs"] = [_chat_entry(tokenizer, entry) for entry in likely]
        content.append(own)
    return {"content": content}


def _chat_entry(tokenizer: Tokenizer, entry: Entry) -> dict[str, Any]:
    token, value, _ = entry
    return {
        "token": tokenizer.token_text(token),
        "logprob": value,
        "bytes": list(tokenizer.token_bytes(token)),
    }


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    offset: int,
) -> tuple[dict[str, Any], int]:
    """The four lists of a completion, and where in the text the next token begins.

    `offset` is where the first of these begins. A token without an entry, such as a prompt's
    first, has null.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token, position in zip(token_ids, logprobs, strict=True):
        text = tokenizer.token_text(token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        if position is None:
            values.append(None)
            tops.append(None)
            continue
        entries = entries_of(position)
        values.append(entries[0][1])
        tops.append({tokenizer.token_text(t): value for t, value, _ in entries})
    lists = {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }
    return lists, offset


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Iterable[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """One element per prompt token: null for the first, then entries by token id."""
    found: list[dict[str, Any] | None] = [None]
    for position in logprobs:
        found.append(
            {
                str(token): {
                    "logprob": value,
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(token),
                }
                for token, value, rank in entries_of(position)
            }
        )
    return found
