"""Prompts and conversations into engine inputs (semantics STOP-2, SAMPLE-2, 4, 8, REQ-5, 7, 8)."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from pagedcore.errors import ModelError, RequestError
from pagedcore.request import SamplingParams
from pagedcore.text.inputs import InputProcessor
from pagedcore.text.messages import checked_messages
from pagedcore.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TALK = [{"role": "user", "content": "hello"}]


@pytest.fixture
def inputs(model_folder):
    """A processor over a folder with the given files."""

    def build(files=None, *, max_model_len=100, vocab_size=400, **options):
        model_folder("chat_template.jinja", TEMPLATE)
        for name, value in (files or {}).items():
            model_folder(name, value)
        folder = model_folder("x.json", {})
        return InputProcessor.from_folder(
            folder,
            Tokenizer.from_folder(folder),
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            **options,
        )

    return build


def test_text_becomes_tokens_with_what_fits_of_max_tokens(inputs):
    processor = inputs(max_model_len=20)
    entry = processor.completion("hello", SamplingParams(max_tokens=1000))
    assert entry.prompt == "hello"
    assert processor.tokenizer.decode(entry.prompt_token_ids) == "hello"
    assert entry.params.max_tokens == 20 - len(entry.prompt_token_ids)
    assert (entry.eos_token_id, entry.bad_words_token_ids) == (1, ())


def test_token_ids_are_taken_as_they_are(inputs):
    entry = inputs().completion([5, 6, 399], SamplingParams(max_tokens=None))
    assert (entry.prompt, entry.prompt_token_ids) == (None, [5, 6, 399])
    assert entry.params.max_tokens == 97


def test_a_conversation_is_rendered_and_gets_no_further_special_tokens(inputs):
    files = {"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": True}}
    processor = inputs(files)
    entry = processor.chat(TALK)
    assert entry.prompt == "user: hello\n"
    assert processor.tokenizer.decode(entry.prompt_token_ids, False) == "user: hello\n"
    assert processor.completion("hello").prompt_token_ids[0] == processor.tokenizer.bos_token_id


def test_a_conversation_can_bring_its_own_template(inputs):
    assert inputs().chat(TALK, chat_template="{{ x }}!", x=3).prompt == "3!"
    with pytest.raises(RequestError, match="not valid Jinja"):
        inputs().chat(TALK, chat_template="{{")


def test_a_model_without_a_template_says_so(byte_level):
    processor = InputProcessor(byte_level, max_model_len=9, vocab_size=400)
    with pytest.raises(RequestError, match=r"no chat template.*--chat-template"):
        processor.chat(TALK)


GENERATION = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": None,
    "do_sample": True,
    "max_new_tokens": 7,
    "eos_token_id": [1, 2, 300, 9999],
}


def test_the_models_defaults_hold_where_nothing_is_asked(inputs):  # SAMPLE-2
    processor = inputs({"generation_config.json": GENERATION})
    assert processor.default_params() == {"temperature": 0.6, "top_p": 0.9}
    assert processor.default_max_tokens == 7
    for entry in (processor.completion("hello"), processor.chat(TALK)):
        assert (entry.params.temperature, entry.params.top_p) == (0.6, 0.9)
        assert entry.params.max_tokens == 7
    asked = processor.completion("hello", SamplingParams(max_tokens=9)).params
    assert (asked.temperature, asked.max_tokens) == (1.0, 9)


def test_without_model_defaults_completions_are_short_and_answers_are_not(inputs):  # REQ-6
    processor = inputs({"generation_config.json": GENERATION}, generation_config="none")
    assert (processor.default_params(), processor.default_max_tokens) == ({}, None)
    assert processor.completion("hello").params.max_tokens == 16
    chat = processor.chat(TALK)
    assert chat.params.max_tokens == 100 - len(chat.prompt_token_ids)
    assert chat.params.stop_token_ids == (2, 300)  # EOS ids are no sampling defaults


def test_a_default_out_of_range_is_the_models_fault(inputs):
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p.*--generation-config"):
        inputs({"generation_config.json": {"top_p": 7}})
    assert inputs({}, generation_config="none").default_params() == {}


def test_further_eos_ids_stop_unless_eos_is_ignored(inputs):  # STOP-2
    processor = inputs({"generation_config.json": GENERATION})
    stops = processor.completion("x", SamplingParams(stop_token_ids=[5, 2])).params.stop_token_ids
    assert stops == (5, 2, 300)
    ignoring = SamplingParams(stop_token_ids=[5], ignore_eos=True)
    assert processor.completion("x", ignoring).params.stop_token_ids == (5,)


def test_eos_ids_come_from_config_json_where_there_is_no_generation_config(inputs):
    processor = inputs({"config.json": {"eos_token_id": 2}})
    assert processor.completion("x").params.stop_token_ids == (2,)


def test_a_tokenizer_without_eos_gives_none(inputs):
    processor = inputs({"tokenizer_config.json": {}, "generation_config.json": {"eos_token_id": 1}})
    entry = processor.completion("x")
    assert (entry.eos_token_id, entry.params.stop_token_ids) == (-1, (1,))


def test_parameters_that_need_no_change_are_the_callers_own(inputs):
    params = SamplingParams(max_tokens=5)
    assert inputs().completion("x", params).params is params


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "must not be empty"),
        ([], "at least one token"),
        ([1, -1], "token id -1, outside 0..399"),
        ([1, 400], "token id 400, outside 0..399"),
        ([1, True], "list of token ids"),
        ([1, "x"], "list of token ids"),
        ([1.5], "list of token ids"),
        ("a\ud800", "unpaired surrogates"),
    ],
)
def test_a_bad_prompt_is_refused(inputs, prompt, said):
    with pytest.raises(RequestError, match=said) as caught:
        inputs().completion(prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("length", [10, 11])
def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers(inputs, length):  # REQ-7
    with pytest.raises(RequestError, match=rf"{length} tokens and max_tokens is 3, .* of 10 tok"):
        inputs(max_model_len=10).completion([5] * length, SamplingParams(max_tokens=3))
    assert inputs(max_model_len=10).completion([5] * 9).params.max_tokens == 1


def test_min_tokens_may_not_be_more_than_fit(inputs):
    with pytest.raises(RequestError, match=r"at most max_tokens \(4\)"):
        inputs(max_model_len=10).completion([5] * 6, SamplingParams(max_tokens=9, min_tokens=5))


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_token_ids_outside_the_vocabulary_are_refused(inputs, field):  # SAMPLE-4
    value = {400: 1.0} if field == "logit_bias" else [400]
    with pytest.raises(RequestError, match=f"{field} holds token id 400"):
        inputs().completion("x", SamplingParams(**{field: value}))


@pytest.mark.parametrize(("keep", "kept"), [(3, [7, 8, 9]), (50, list(range(10))), (-1, [8, 9])])
def test_a_prompt_can_be_cut_to_its_end(inputs, keep, kept):  # REQ-8
    processor = inputs(max_model_len=3 if keep == -1 else 100)
    entry = processor.completion(list(range(10)), truncate_prompt_tokens=keep)
    assert entry.prompt_token_ids == kept


@pytest.mark.parametrize("keep", [0, -2, True, 1.5])
def test_a_cut_to_nothing_is_refused(inputs, keep):
    with pytest.raises(RequestError, match="truncate_prompt_tokens"):
        inputs().completion("x", truncate_prompt_tokens=keep)


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_bad_words_are_spelled_with_and_without_a_space(kind, request):  # SAMPLE-8
    tokenizer = request.getfixturevalue(kind)
    processor = InputProcessor(tokenizer, max_model_len=99, vocab_size=400)
    entry = processor.completion("x", SamplingParams(bad_words=["cat", " sat"]))
    words = entry.bad_words_token_ids
    spelled = {b"".join(map(tokenizer.token_bytes, ids)).decode() for ids in words}
    assert {"cat", " cat", "sat", " sat"} <= spelled
    assert len(words) == len(set(words))
    assert {text.strip() for text in spelled} == {"cat", "sat"}


def test_a_bad_word_without_tokens_is_refused():
    processor = InputProcessor(
        Tokenizer(Backend(models.BPE(vocab={"a": 0}, merges=[]))), max_model_len=9, vocab_size=1
    )
    with pytest.raises(RequestError, match="'b' has no tokens"):
        processor.completion("a", SamplingParams(bad_words=["b"]))


def test_messages_are_made_plain():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert checked_messages(
        [
            {"role": "user", "content": parts, "name": "me"},
            {"role": "assistant", "tool_calls": [call]},
        ]
    ) == [
        {"role": "user", "content": "a\nb", "name": "me"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": [1]}}}],
        },
    ]
    assert call["function"]["arguments"] == '{"a": [1]}'  # the caller's own is left alone


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "messages"),
        ("hi", "messages"),
        (None, "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([*TALK, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_bad_message_is_named_by_its_place(messages, where):  # REQ-5
    with pytest.raises(RequestError) as caught:
        checked_messages(messages)
    assert caught.value.param == where
    assert where in str(caught.value)
