"""Tiny tokenizers of the kinds that models come with, trained here and now."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer

from pagedcore.text.tokenizer import Tokenizer

CORPUS = ["the cat sat on the mat and the END came", "hello world, hello there", "naïve café"] * 20
SPECIAL = ["<s>", "</s>", "<tool>"]
ROLES = {"bos_token": "<s>", "eos_token": "</s>"}


def byte_level_backend():
    """GPT-2's kind: every byte is a character of the vocabulary."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def llama_backend():
    """Llama 2's kind: spaces are U+2581, one stands before the text, unknown bytes are tokens."""
    learner = Backend(models.BPE())
    learner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=340, special_tokens=["<unk>", *SPECIAL, *byte_tokens], show_progress=False
    )
    learner.train_from_iterator(CORPUS, trainer)
    model = json.loads(learner.to_str())["model"]
    backend = Backend(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = learner.normalizer
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", model["vocab"]["<s>"])]
    )
    backend.add_special_tokens(SPECIAL)
    return backend


def metaspace_backend():
    """T5's kind: the decoder drops the first token's space."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = BpeTrainer(vocab_size=120, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def byte_level():
    return Tokenizer(byte_level_backend(), ROLES)


@pytest.fixture(scope="session")
def llama():
    return Tokenizer(llama_backend(), ROLES)


@pytest.fixture(scope="session")
def metaspace():
    return Tokenizer(metaspace_backend(), ROLES)


@pytest.fixture(scope="session")
def spelling():
    """A tokenizer whose tokens are given texts: `spelling("ab", "cE")` has ids 0 and 1."""

    def build(*texts, eos=None):
        ids = {text: i for i, text in enumerate((*texts, "<unk>"))}
        backend = Backend(models.WordLevel(ids, unk_token="<unk>"))
        backend.decoder = decoders.Fuse()
        if eos is not None:
            backend.add_special_tokens([AddedToken(eos, special=True)])
        return Tokenizer(backend, {} if eos is None else {"eos_token": eos})

    return build


@pytest.fixture
def model_folder(tmp_path):
    """A model folder's text files, byte-level; `write(name, value)` adds one more."""
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))

    def write(name, value):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return tmp_path

    write("tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    return write
