"""Texts that become vectors, and pairs that become scores, into what the engine takes."""

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from pagedcore.errors import RequestError
from pagedcore.text.inputs import InputProcessor
from pagedcore.text.tokenizer import Tokenizer

WORDS = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "##s", "mat"]
UNK, CLS, SEP, THE, CAT, SAT, S, MAT = range(8)


def word_pieces(second_type):
    """BERT's kind of tokenizer; `second_type` is the type of a second text."""
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(w, special=True) for w in WORDS[:3]])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second_type} [SEP]:{second_type}",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return Tokenizer(backend)


@pytest.fixture
def inputs():
    return InputProcessor(word_pieces(1), max_model_len=6, vocab_size=8)


def test_a_text_may_fill_the_models_length_with_its_special_tokens(inputs):
    item = inputs.pooled("The cats sat")
    assert item.prompt == "The cats sat"
    assert item.prompt_token_ids == [CLS, THE, CAT, S, SAT, SEP]
    with pytest.raises(RequestError, match="has 7 tokens; the model takes at most 6") as caught:
        inputs.pooled("The cats sat mat", param="input")
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (-1, [CLS, THE, CAT, S, SAT, SEP]),
        (4, [CLS, THE, CAT, SEP]),
        (2, [CLS, SEP]),
        (1, [CLS]),
    ],
)
def test_what_is_cut_is_the_end_of_the_text_and_not_what_stands_behind_it(inputs, asked, kept):
    item = inputs.pooled("the cats sat the mat", truncate_prompt_tokens=asked)
    assert item.prompt_token_ids == kept


def test_token_ids_and_plain_texts_are_taken_as_they_are(inputs):
    assert inputs.pooled([5, 3]).prompt_token_ids == [5, 3]
    assert inputs.pooled([3] * 9, truncate_prompt_tokens=-1).prompt_token_ids == [3] * 6
    assert inputs.pooled("cat", add_special_tokens=False).prompt_token_ids == [CAT]


@pytest.mark.parametrize("prompt", ["", [], [8], [-1], [True], ["a"], [1.0]])
def test_what_is_no_prompt_is_refused(inputs, prompt):
    with pytest.raises(RequestError) as caught:
        inputs.pooled(prompt)
    assert caught.value.param == "input"


def test_a_pair_is_joined_as_the_tokenizer_does_with_the_length_of_its_first_part(inputs):
    item = inputs.pair("cat", "sat")
    assert item.prompt_token_ids == [CLS, CAT, SEP, SAT, SEP]
    assert item.num_first == 3
    cut = inputs.pair("cat", "sat the mat", truncate_prompt_tokens=-1)
    assert cut.prompt_token_ids == [CLS, CAT, SEP, SAT, THE, SEP]
    with pytest.raises(RequestError, match="has 7 tokens"):
        inputs.pair("cat", "sat the mat")
    with pytest.raises(RequestError, match="empty text"):
        inputs.pair("cat", "")


def test_a_tokenizer_with_one_type_tells_no_parts():
    inputs = InputProcessor(word_pieces(0), max_model_len=6, vocab_size=8)
    assert inputs.pair("cat", "sat").num_first is None
