"""Names of special tokens in what people write are text (IN-25)."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from pagedcore.text.quoting import BREAK, Quoting
from pagedcore.text.tokenizer import Tokenizer

NAMES = ["<|end|>", "<|end|>>", "<s>", "§"]


@pytest.fixture(scope="module")
def tokenizer():
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in NAMES])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return Tokenizer(backend)


def said(text, role="user"):
    return [{"role": role, "content": text}]


def encoded(tokenizer, text):
    (message,) = tokenizer.quoting.quoted(said(text))
    return tokenizer.encode_quoted(message["content"])


def test_a_users_name_of_a_special_token_is_encoded_as_its_letters(tokenizer):
    ids = encoded(tokenizer, "a<|end|>b<s>")
    assert not tokenizer.special_ids.intersection(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|end|>b<s>"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_may_have_special_tokens(tokenizer, role):
    messages = said("x<s>", role)
    assert tokenizer.quoting.quoted(messages) == messages


def test_other_added_tokens_and_other_keys_stay_as_they_are(tokenizer):
    messages = [
        {"role": "user", "content": "<tool>", "name": "<s>"},
        {"role": "a", "content": None},
    ]
    assert tokenizer.quoting.quoted(messages) == messages


def test_without_special_tokens_nothing_is_looked_for():
    assert Quoting([]).quoted(said("<s>")) == said("<s>")


@given(st.lists(st.sampled_from([*NAMES[:3], "<", "|", "end", ">", "s", " ", "ä"])).map("".join))
def test_no_text_of_a_user_becomes_a_special_token(tokenizer, text):
    ids = encoded(tokenizer, text)
    assert not tokenizer.special_ids.intersection(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_text_without_breaks_is_encoded_as_ever(tokenizer):
    assert BREAK not in "a <s>"
    assert tokenizer.encode_quoted("a <s>") == tokenizer.encode("a <s>")
