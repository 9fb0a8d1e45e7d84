"""A model folder's tokenizer files, and what encoding and single tokens give."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedcore.errors import ModelError, RequestError
from pagedcore.text.tokenizer import Tokenizer

KINDS = ["byte_level", "llama", "metaspace"]


def test_a_folder_gives_text_and_special_tokens(model_folder):
    folder = model_folder("special_tokens_map.json", {"bos_token": "<tool>", "unk_token": "<s>"})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_tokens == {  # tokenizer_config.json wins
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<s>",
    }
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.decode(tokenizer.encode("hello <tool> cat"), False) == "hello <tool> cat"
    assert tokenizer.decode(tokenizer.encode("hello <tool> cat")) == "hello  cat"


def test_a_tokenizer_without_special_tokens_has_none(tmp_path, byte_level):
    byte_level._backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token_id) == (None,) * 3


def test_a_folder_without_tokenizer_json_says_what_to_do(tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": 1}'),
        ("tokenizer_config.json", "[]"),
        ("special_tokens_map.json", "nonsense"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
    ],
)
def test_a_broken_file_is_named(model_folder, name, content):
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        Tokenizer.from_folder(model_folder(name, content))


def test_tokens_that_only_the_config_declares_are_added(model_folder):
    size = Tokenizer.from_folder(model_folder("x.json", {})).vocab_size
    declared = {"content": "<think>", "special": False, "lstrip": False, "rstrip": False}
    special = {"content": "<pad>", "special": True, "__type": "AddedToken"}
    decoder = {str(size + 1): special, str(size): declared}
    tokenizer = Tokenizer.from_folder(
        model_folder("tokenizer_config.json", {"added_tokens_decoder": decoder})
    )
    assert tokenizer.encode("<think><pad>") == [size, size + 1]
    assert tokenizer.special_ids == {0, 1, 2, size + 1}
    assert tokenizer.vocab_size == size + 2


def test_the_config_decides_whether_a_token_is_special(model_folder):
    folder = model_folder("x.json", {})
    token = Tokenizer.from_folder(folder).encode("h")[0]
    for special, text in ((True, "i"), (False, "hi")):
        decoder = {str(token): {"content": "h", "special": special}}
        model_folder("tokenizer_config.json", {"added_tokens_decoder": decoder})
        tokenizer = Tokenizer.from_folder(folder)
        assert (token in tokenizer.special_ids) == special
        assert tokenizer.decode(tokenizer.encode("hi")) == text


def test_a_token_under_another_id_is_refused(model_folder):
    decoder = {"7000": {"content": "<think>", "special": True}}
    folder = model_folder("tokenizer_config.json", {"added_tokens_decoder": decoder})
    with pytest.raises(ModelError, match="'<think>' the id 7000"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, []),
        ({"add_bos_token": False}, []),
        ({"add_bos_token": True}, ["<s>"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "</s>"]),
    ],
)
def test_the_config_can_ask_for_special_tokens_around_a_text(model_folder, config, expected):
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer.from_folder(model_folder("tokenizer_config.json", roles | config))
    inner = tokenizer.encode("hello", add_special_tokens=False)
    ids = tokenizer.encode("hello")
    at = ids.index(inner[0])
    assert ids[at : at + len(inner)] == inner
    around = ids[:at] + ids[at + len(inner) :]
    assert [tokenizer.token_text(token) for token in around] == expected


@pytest.mark.parametrize(("add_bos", "num_bos"), [(None, 1), (True, 1), (False, 0)])
def test_bos_is_never_put_twice(llama, add_bos, num_bos):
    tokenizer = Tokenizer(llama._backend, llama.special_tokens, add_bos=add_bos)
    assert tokenizer.encode("hello").count(tokenizer.bos_token_id) == num_bos
    assert tokenizer.encode("hello", add_special_tokens=False).count(tokenizer.bos_token_id) == 0


def test_a_files_own_truncation_and_padding_do_not_apply(model_folder):
    path = model_folder("x.json", {}) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    path.write_text(json.dumps(content))
    ids = Tokenizer.from_folder(path.parent).encode("hello there cat")
    assert 2 < len(ids) < 50


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_no_unicode_is_the_callers_mistake(kind, request):
    with pytest.raises(RequestError, match="unpaired surrogates"):
        request.getfixturevalue(kind).encode("a\ud800")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", ["byte_level", "llama"])
@given(text=st.text(st.sampled_from("the cat ä🙂\n")))
def test_the_bytes_of_tokens_are_the_texts(kind, request, text):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined == (f" {text}" if kind == "llama" and text else text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_text_keeps_its_leading_space(kind, request):
    tokenizer = request.getfixturevalue(kind)
    *_, token = tokenizer.encode("the the", add_special_tokens=False)
    assert tokenizer.token_text(token) == " the"


def test_a_token_that_is_no_character_shows_its_bytes(byte_level, llama):
    for tokenizer in (byte_level, llama):
        token = tokenizer.encode("🙂")[-1]
        assert tokenizer.token_bytes(token) == "🙂".encode()[-1:]
        assert tokenizer.token_text(token) == "\ufffd"
        assert tokenizer.token_text(tokenizer.eos_token_id) == "</s>"
        assert tokenizer.token_bytes(10**6) == b""
