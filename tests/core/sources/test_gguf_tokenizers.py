"""Converted tokenizers against those they were made from, and against SentencePiece's algorithm."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from pagedcore.errors import ModelError
from pagedcore.sources.gguf_reader import GgufFile
from pagedcore.sources.gguf_tokenizer import write_tokenizer
from pagedcore.text.tokenizer import Tokenizer

I32 = 5
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CORPUS = ["the cat sat on the mat", "hello world, it's 12 o'clock", "naïve café"] * 20
TEXTS = st.text(st.sampled_from("the catsonmhlwrd,.'I12345 \n\té▁猫🙂"), max_size=40)
FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def converted(writer, tmp_path):
    write_tokenizer(GgufFile.open(writer.save(tmp_path / "x.gguf")), tmp_path)
    return Backend.from_file(str(tmp_path / "tokenizer.json"))


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE, with what stands in front of it left out."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture
def byte_level(writer, trained):
    """The trained tokenizer as a GGUF file has it."""
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.set("general.architecture", "llama")
    writer.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", "gpt-2")
    writer.set("tokenizer.ggml.tokens", tokens)
    writer.set("tokenizer.ggml.merges", [" ".join(pair) for pair in model["merges"]])
    types = np.where(np.arange(len(tokens)) < 3, CONTROL, NORMAL)
    writer.set("tokenizer.ggml.token_type", types, I32)
    writer.set("tokenizer.ggml.bos_token_id", 0).set("tokenizer.ggml.eos_token_id", 1)
    return writer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_gives_back_every_text(tmp_path, byte_level, pre):
    byte_level.set("tokenizer.ggml.pre", pre).set("tokenizer.ggml.add_bos_token", False)
    backend = converted(byte_level, tmp_path)

    @FUZZ
    @given(st.text(max_size=30))
    def check(text):
        import unicodedata

        wanted = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert backend.decode(backend.encode(text).ids, skip_special_tokens=False) == wanted

    check()


def test_a_gpt2_tokenizer_gives_the_ids_of_the_one_it_was_made_from(tmp_path, byte_level, trained):
    backend = converted(byte_level, tmp_path)

    @FUZZ
    @given(TEXTS)
    def check(text):
        assert backend.encode(text).ids == trained.encode(text).ids

    check()


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", "Ġ12345", "Ġcats", "ĠĊĊ", "Go", "!!"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġcats", "ĠĊĊ", "Go", "!!"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "Ġcats", "ĠĊĊ", "Go", "!!"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġcats", "ĠĊĊ", "Go", "!!"]),
    ],
)
def test_text_is_cut_into_words_as_the_family_does(tmp_path, byte_level, pre, words):
    backend = converted(byte_level.set("tokenizer.ggml.pre", pre), tmp_path)
    cut = backend.pre_tokenizer.pre_tokenize_str("It's 12345 cats \n\nGo!!")
    if pre in ("gpt-2", "smollm"):  # whose pattern leaves the last of several blanks to the word
        words = [*words[: words.index("ĠĊĊ")], "ĠĊ", "Ċ", "Go", "!!"]
    assert [word for word, _ in cut] == words


@pytest.mark.parametrize(("pre", "bos"), [("llama-bpe", [0]), ("gpt-2", []), ("qwen2", [])])
def test_bos_begins_a_text_as_the_family_does_unless_the_file_says(
    tmp_path, byte_level, trained, pre, bos
):
    plain = trained.encode("the cat").ids
    byte_level.set("tokenizer.ggml.pre", pre)
    assert converted(byte_level, tmp_path).encode("the cat").ids == bos + plain
    for add in (True, False):
        byte_level.set("tokenizer.ggml.add_bos_token", add)
        assert converted(byte_level, tmp_path).encode("the cat").ids == [0] * add + plain


def test_eos_ends_a_text_where_the_file_says(tmp_path, byte_level, trained):
    byte_level.set("tokenizer.ggml.add_eos_token", True)
    assert converted(byte_level, tmp_path).encode("cat").ids == [*trained.encode("cat").ids, 1]


def test_special_tokens_are_cut_out_of_a_text(tmp_path, byte_level):
    tokens = byte_level.get("tokenizer.ggml.tokens")
    byte_level.set("tokenizer.ggml.tokens", [*tokens, "<tool>"])
    types = byte_level.get("tokenizer.ggml.token_type")
    byte_level.set("tokenizer.ggml.token_type", np.append(types, USER_DEFINED), I32)
    backend = converted(byte_level, tmp_path)

    ids = backend.encode("cat<|im_end|><tool>cat").ids

    assert ids.count(2) == 1
    assert ids.count(len(tokens)) == 1
    assert backend.decode(ids) == "cat<tool>cat"  # one is special, the other is text
    assert backend.decode(ids, skip_special_tokens=False) == "cat<|im_end|><tool>cat"


def test_both_readers_of_the_folder_see_the_same(tmp_path, byte_level):
    from transformers import AutoTokenizer

    byte_level.set("tokenizer.ggml.add_bos_token", True)
    template = "{% for m in messages %}<s>{{ m['content'] }}<|im_end|>{% endfor %}é"
    byte_level.set("tokenizer.chat_template", template)
    converted(byte_level, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    assert ours.encode("the cat") == theirs.encode("the cat")
    assert ours.encode("the cat").count(0) == 1
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert theirs.chat_template == template
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == template


PIECES = [
    "▁",
    "t",
    "h",
    "e",
    "c",
    "a",
    "s",
    "th",
    "▁t",
    "▁th",
    "▁the",
    "he",
    "at",
    "cat",
    "▁c",
    "▁ca",
]
PIECES += ["▁cat", "at▁", "tt", "ee", "▁▁"]


@pytest.fixture
def sentencepiece(writer):
    """A vocabulary as of Llama 2, and its scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES)]
    scores = np.zeros(len(tokens), np.float32)
    scores[259:] = -np.random.default_rng(0).permutation(len(PIECES))
    writer.set("general.architecture", "llama").set("tokenizer.ggml.model", "llama")
    writer.set("tokenizer.ggml.tokens", tokens).set("tokenizer.ggml.scores", scores)
    writer.set("tokenizer.ggml.token_type", np.array(types), I32)
    writer.set("tokenizer.ggml.bos_token_id", 1).set("tokenizer.ggml.eos_token_id", 2)
    writer.set("tokenizer.ggml.unknown_token_id", 0)
    return writer


def merge_by_score(text, tokens, scores):
    """SentencePiece's BPE: again and again, join the neighbours that make the best token."""
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list(text)
    while True:
        joined = [a + b for a, b in pairwise(parts)]
        known = [i for i, token in enumerate(joined) if token in ids]
        if not known:
            break
        best = max(known, key=lambda i: (scores[ids[joined[i]]], -i))
        parts[best : best + 2] = [joined[best]]
    for part in parts:
        if part in ids:
            yield ids[part]
        else:
            yield from (ids[f"<0x{byte:02X}>"] for byte in part.encode())


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_merges_the_best_first(tmp_path, sentencepiece, prefix):
    sentencepiece.set("tokenizer.ggml.add_space_prefix", prefix)
    backend = converted(sentencepiece, tmp_path)
    tokens = sentencepiece.get("tokenizer.ggml.tokens")
    scores = sentencepiece.get("tokenizer.ggml.scores")

    @FUZZ
    @given(st.text(st.sampled_from("thecas 猫é"), min_size=1, max_size=20))
    def check(text):
        ids = backend.encode(text).ids
        spaced = ("▁" if prefix else "") + text.replace(" ", "▁")
        assert ids == [1, *merge_by_score(spaced, tokens, scores)]
        assert backend.decode(ids) == text

    check()


def test_a_token_too_long_to_be_merged_costs_nothing(tmp_path, sentencepiece):
    tokens = sentencepiece.get("tokenizer.ggml.tokens")
    scores = sentencepiece.get("tokenizer.ggml.scores")
    sentencepiece.set("tokenizer.ggml.tokens", [*tokens, "t" * 3_000_000])
    sentencepiece.set("tokenizer.ggml.scores", np.append(scores, 0))
    sentencepiece.drop("tokenizer.ggml.token_type")
    assert converted(sentencepiece, tmp_path).encode("the").ids


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokenizer.ggml.model", "bert", "tokenizer 'bert', and those read are gpt2 and llama"),
        ("tokenizer.ggml.pre", "klingon", "by 'klingon', and those known are"),
        ("tokenizer.ggml.merges", ["th e", "nospace"], "the merge 'nospace'"),
        ("tokenizer.ggml.merges", ["猫 狗"], "cannot be built"),
        ("tokenizer.ggml.token_type", np.array([1, 2]), "not one integer for each of"),
        ("tokenizer.ggml.tokens", ["a", "b", "a"], "has the token 'a' twice"),
        ("tokenizer.ggml.bos_token_id", 5000, "has 5000 for its bos token"),
        ("tokenizer.ggml.add_bos_token", 1, "has a int for 'tokenizer.ggml.add_bos_token'"),
        ("tokenizer.chat_template", 1, "has a int for 'tokenizer.chat_template'"),
    ],
)
def test_parts_that_disagree_are_refused(tmp_path, byte_level, key, value, words):
    byte_level.set(key, value, I32 if isinstance(value, np.ndarray) else None)
    with pytest.raises(ModelError) as caught:
        converted(byte_level, tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_that_are_missing_or_too_few_are_refused(tmp_path, sentencepiece):
    sentencepiece.set("tokenizer.ggml.scores", np.zeros(3, np.float32))
    with pytest.raises(ModelError, match=r"has 3 float32 in 'tokenizer\.ggml\.scores'"):
        converted(sentencepiece, tmp_path)
    with pytest.raises(ModelError, match=r"lacks the metadata 'tokenizer\.ggml\.scores'"):
        converted(sentencepiece.drop("tokenizer.ggml.scores"), tmp_path)


@pytest.mark.parametrize("token", ["a:b", "$A", "a:b:c", " ", ""])
def test_an_odd_bos_token_is_refused_or_works(tmp_path, byte_level, token):
    tokens = byte_level.get("tokenizer.ggml.tokens")
    byte_level.set("tokenizer.ggml.tokens", [token, *tokens[1:]])
    byte_level.set("tokenizer.ggml.add_bos_token", True)
    try:
        ids = converted(byte_level, tmp_path).encode("cat").ids
    except ModelError:
        return
    assert ids
