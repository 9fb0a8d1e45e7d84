"""Text from tokens that arrive in pieces (semantics DETOK-1, 2, 10)."""

import itertools

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from pagedcore.text.detokenizer import Detokenizer
from pagedcore.text.tokenizer import Tokenizer

relaxed = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300
)
tokens = st.lists(st.integers(0, 345), max_size=60)  # some of them outside the vocabulary
skips = st.booleans()


def streamed(tokenizer, prompt, output, **options):
    detokenizer = Detokenizer(tokenizer, prompt, **options)
    pieces = [detokenizer.step(token) for token in output]
    return [*pieces, detokenizer.pending()]


def added(tokenizer, prompt, output, skip):
    """What the output's ids add to the decoded prompt, from two whole decodes."""
    before = tokenizer.decode(prompt, skip)
    whole = tokenizer.decode([*prompt, *output], skip)
    if not whole.startswith(before):
        before = before.rstrip("\ufffd")
    assert whole.startswith(before)
    return whole[len(before) :]


@relaxed
@given(prompt=tokens, output=tokens, skip=skips)
def test_byte_level_pieces_join_to_one_decode_of_any_tokens(byte_level, prompt, output, skip):
    pieces = streamed(byte_level, prompt, output, skip_special_tokens=skip)
    assert "".join(pieces) == added(byte_level, prompt, output, skip)


@relaxed
@given(prompt=tokens, output=tokens, skip=skips)
def test_metaspace_pieces_join_to_one_decode_of_any_tokens(metaspace, prompt, output, skip):
    pieces = streamed(metaspace, prompt, output, skip_special_tokens=skip)
    assert "".join(pieces) == added(metaspace, prompt, output, skip)


@relaxed
@given(
    prompt=st.text(st.sampled_from("the cat ä🙂\n"), max_size=20),
    output=st.text(st.sampled_from(" hello wörld🙂\n"), max_size=40),
    skip=skips,
)
def test_byte_fallback_pieces_join_to_one_decode_of_valid_text(llama, prompt, output, skip):
    prompt_ids = llama.encode(prompt)
    output_ids = llama.encode(output, add_special_tokens=False)
    pieces = streamed(llama, prompt_ids, output_ids, skip_special_tokens=skip)
    assert "".join(pieces) == added(llama, prompt_ids, output_ids, skip)


@relaxed
@given(prompt=tokens, output=tokens)
@example(prompt=[198], output=[132, 198, 132])  # the prompt ends within a character
def test_byte_fallback_pieces_join_to_one_decode_unless_it_is_invalid(llama, prompt, output):
    text = "".join(streamed(llama, prompt, output))
    if "\ufffd" not in llama.decode([*prompt, *output]):
        assert text == added(llama, prompt, output, True)


texts = st.text(st.sampled_from("the cat ä🙂\n漢 "), max_size=60)


@relaxed
@given(data=st.data(), kind=st.sampled_from(["byte_level", "metaspace", "llama"]), skip=skips)
def test_many_tokens_at_once_are_the_text_of_each_after_another(request, data, kind, skip):
    tokenizer = request.getfixturevalue(kind)
    prompt = data.draw(tokens)
    ids = st.one_of(tokens, texts.map(lambda text: tokenizer.encode(text, False)))
    output = data.draw(st.lists(ids, max_size=6).map(lambda parts: sum(parts, [])))  # noqa: RUF017 few
    cuts = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=4)))
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    pieces = [
        detokenizer.steps(output[begin:end])
        for begin, end in itertools.pairwise([0, *cuts, len(output)])
    ]
    one_by_one = streamed(tokenizer, prompt, output, skip_special_tokens=skip)
    assert "".join(pieces) + detokenizer.pending() == "".join(one_by_one)


def test_a_byte_run_that_turns_invalid_keeps_the_characters_before(llama):
    good = llama.encode("ä", add_special_tokens=False)
    text = "".join(streamed(llama, llama.encode("the"), [*good, good[-1]]))
    assert text == " ä\ufffd"


def test_no_piece_ends_within_a_character(byte_level):  # DETOK-2
    output = byte_level.encode("a🙂b", add_special_tokens=False)
    assert streamed(byte_level, [], output) == ["a", "", "", "", "🙂", "b", ""]


def test_what_is_pending_at_the_end_comes_out_as_decoded(byte_level):  # DETOK-2
    output = byte_level.encode("a🙂", add_special_tokens=False)[:-1]
    assert streamed(byte_level, [], output) == ["a", "", "", "", "\ufffd"]


def test_a_prompt_that_ends_within_a_character_leaves_it_to_the_output(byte_level):
    ids = byte_level.encode("a🙂b", add_special_tokens=False)
    assert streamed(byte_level, ids[:3], ids[3:]) == ["", "🙂", "b", ""]


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_the_first_word_keeps_its_space_after_a_prompt_and_loses_it_without(kind, request):
    tokenizer = request.getfixturevalue(kind)
    world = tokenizer.encode(" world"[1:], add_special_tokens=False)
    assert "".join(streamed(tokenizer, tokenizer.encode("hello"), world)) == " world"
    assert "".join(streamed(tokenizer, [tokenizer.bos_token_id], world)) == "world"


def test_a_prompt_of_special_tokens_does_not_hide_the_text_before_them(llama):
    specials = [llama.eos_token_id] * 30
    prompt = llama.encode("hello") + specials
    world = llama.encode("world", add_special_tokens=False)
    assert "".join(streamed(llama, prompt, world)) == " world"


def test_special_tokens_come_out_only_when_they_are_not_skipped(byte_level):  # DETOK-10
    hello = byte_level.encode("hello<tool> world", add_special_tokens=False)
    assert "".join(streamed(byte_level, [], hello)) == "hello world"
    kept = streamed(byte_level, [], hello, skip_special_tokens=False)
    assert "".join(kept) == "hello<tool> world"


@pytest.mark.parametrize(
    ("spaces", "text"), [(True, "hi </s> <tool> </s>"), (False, "hi </s><tool></s>")]
)
def test_spaces_between_special_tokens_are_the_requests_choice(spaces, text):  # DETOK-10
    backend = Backend(
        models.WordLevel({"hi": 0, "<unk>": 1}, unk_token="<unk>")
    )  # without a decoder, tokens join by spaces
    backend.add_special_tokens(["</s>", "<tool>"])
    pieces = streamed(
        Tokenizer(backend),
        [],
        [0, 2, 3, 2],
        skip_special_tokens=False,
        spaces_between_special_tokens=spaces,
    )
    assert "".join(pieces) == text


class CountingTokenizer:
    """Counts how many ids are decoded."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special_ids = tokenizer.special_ids
        self.num_decoded = 0

    def is_silent(self, token_id, *, skip_special_tokens):
        return self.tokenizer.is_silent(token_id, skip_special_tokens=skip_special_tokens)

    def decode(self, ids, skip_special_tokens=True):
        self.num_decoded += len(ids)
        return self.tokenizer.decode(ids, skip_special_tokens)


@pytest.mark.parametrize("what", ["text", "invalid bytes", "skipped tokens", "unknown ids"])
def test_the_work_per_token_does_not_grow_with_the_text(byte_level, what):  # DETOK-10
    one = {
        "text": byte_level.encode("a")[0],
        "invalid bytes": byte_level.encode("🙂")[1],
        "skipped tokens": byte_level.eos_token_id,
        "unknown ids": 10**6,
    }[what]
    counting = CountingTokenizer(byte_level)
    text = "".join(streamed(counting, [one] * 5000, [one] * 5000))
    assert text == byte_level.decode([one] * 5000)
    prompt_is_silent = what in ("skipped tokens", "unknown ids")
    assert counting.num_decoded <= (5000 if prompt_is_silent else 5000 * 50)
