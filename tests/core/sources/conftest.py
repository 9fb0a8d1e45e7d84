"""A writer of GGUF files, good and bad, and a cache of one's own."""

import struct

import numpy as np
import pytest

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B"}
CODES |= {U64: "Q", I64: "q", F64: "d"}

BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24)}
BLOCKS |= {8: (32, 34), 12: (256, 144), 13: (256, 176), 14: (256, 210)}
"""Values and bytes of a block, by ggml's number of its type."""


class GgufWriter:
    """Puts a GGUF file together, and remembers where each number in its header stands."""

    def __init__(self):
        self.magic = b"GGUF"
        self.version = 3
        self.alignment = 32
        self.pairs = []
        self.tensors = []
        self.fields = []
        """(what it is, where it begins, its struct code), of the last `build`."""

    def set(self, key, value, kind=None):
        """Write a value as its most usual type, or as `kind`; it replaces one of the same key."""
        self.pairs = [pair for pair in self.pairs if pair[0] != key]
        self.pairs.append((key, value, kind))
        return self

    def drop(self, *keys):
        self.pairs = [pair for pair in self.pairs if pair[0] not in keys]
        self.tensors = [tensor for tensor in self.tensors if tensor[0] not in keys]
        return self

    def get(self, key):
        return next(value for name, value, _ in self.pairs if name == key)

    def tensor(self, name, values, kind=0, shape=None):
        """Add float32 `values`, or the bytes of a quantized tensor of this `shape`."""
        if not isinstance(values, bytes):
            shape, values = values.shape, encode(values, kind)
        self.tensors.append((name, shape, kind, values))
        return self

    def build(self, offsets=None):
        out = bytearray(self.magic)
        self.fields = []

        def number(what, code, value):
            self.fields.append((what, len(out), code))
            out.extend(struct.pack(f"<{code}", value))

        def string(what, text):
            data = text if isinstance(text, bytes) else text.encode()
            number(f"length of {what}", "Q", len(data))
            out.extend(data)

        number("version", "I", self.version)
        number("number of tensors", "Q", len(self.tensors))
        number("number of pairs", "Q", len(self.pairs))
        for key, value, kind in self.pairs:
            string("key", key)
            write_value(key, value, kind, number, string)
        places, end = [], 0
        for *_, data in self.tensors:
            places.append(end)
            end = -(-(end + len(data)) // self.alignment) * self.alignment
        for i, (name, shape, kind, _) in enumerate(self.tensors):
            string("tensor name", name)
            number("rank", "I", len(shape))
            for size in reversed(shape):
                number("size", "Q", size)
            number("tensor type", "I", kind)
            number("offset", "Q", (offsets or {}).get(name, places[i]))
        for *_, data in self.tensors:
            out.extend(bytes(-len(out) % self.alignment) + data)
        return bytes(out)

    def save(self, path):
        path.write_bytes(self.build())
        return path


def write_value(key, value, kind, number, string):
    if isinstance(value, list | np.ndarray):
        number(f"type of {key}", "I", ARRAY)
        item = STRING if isinstance(value, list) else kind if kind is not None else F32
        number(f"item type of {key}", "I", item)
        number(f"items of {key}", "Q", len(value))
        for thing in value:
            if item == STRING:
                string(f"item of {key}", thing)
            else:
                number(f"item of {key}", CODES[item], thing)
        return
    if kind is None:
        kinds = {bool: BOOL, int: U32, float: F32, str: STRING, bytes: STRING}
        kind = kinds[type(value)]
    number(f"type of {key}", "I", kind)
    if kind == STRING:
        string(f"value of {key}", value)
    else:
        number(f"value of {key}", CODES[kind], value)


def encode(values, kind):
    """float32 as bytes of F32, F16, BF16 or Q8_0, the latter rounded to its scale."""
    values = np.asarray(values, np.float32)
    if kind == 0:
        return values.tobytes()
    if kind == 1:
        return values.astype(np.float16).tobytes()
    if kind == 30:
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    assert kind == 8
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    q = np.round(blocks / np.maximum(scale.astype(np.float32), 1e-9)).astype(np.int8)
    return b"".join(s.tobytes() + row.tobytes() for s, row in zip(scale, q, strict=True))


def tiny_llama():
    """A whole model of one layer: 32 wide, two heads that share a KV head, six tokens."""
    rng = np.random.default_rng(0)
    writer = GgufWriter()
    writer.set("general.architecture", "llama")
    writer.set("llama.block_count", 1).set("llama.context_length", 64)
    writer.set("llama.embedding_length", 32).set("llama.feed_forward_length", 64)
    writer.set("llama.attention.head_count", 2).set("llama.attention.head_count_kv", 1)
    writer.set("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.set("llama.rope.freq_base", 10000.0)
    writer.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", "gpt-2")
    writer.set("tokenizer.ggml.tokens", ["<s>", "</s>", "a", "b", "ab", "aba"])
    writer.set("tokenizer.ggml.token_type", np.array([3, 3, 1, 1, 1, 1]), I32)
    writer.set("tokenizer.ggml.merges", ["a b", "ab a"])
    writer.set("tokenizer.ggml.bos_token_id", 0).set("tokenizer.ggml.eos_token_id", 1)
    writer.set("tokenizer.ggml.add_bos_token", True)
    writer.set("tokenizer.chat_template", "{{ messages[0]['content'] }}")

    def add(name, *shape, kind=0):
        writer.tensor(name, rng.standard_normal(shape, np.float32), kind)

    add("token_embd.weight", 6, 32)
    add("blk.0.attn_norm.weight", 32)
    for part, rows in (("q", 32), ("k", 16), ("v", 16), ("output", 32)):
        add(f"blk.0.attn_{part}.weight", rows, 32, kind=8)
    add("blk.0.ffn_norm.weight", 32)
    for part, shape in (("gate", (64, 32)), ("up", (64, 32)), ("down", (32, 64))):
        add(f"blk.0.ffn_{part}.weight", *shape, kind=1)
    add("output_norm.weight", 32)
    return writer


@pytest.fixture
def writer():
    """An empty GGUF file."""
    return GgufWriter()


@pytest.fixture
def tiny():
    """A small model, to be written as it is or spoiled first."""
    return tiny_llama()


@pytest.fixture(scope="session")
def tiny_bytes():
    """What each field of a small model's header is, and the file."""
    writer = tiny_llama()
    data = writer.build()
    return writer.fields, data


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of pagedcore's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PAGEDCORE_CACHE", str(folder))
    return folder
