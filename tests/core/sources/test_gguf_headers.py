"""What a hostile file can do: nothing but be refused."""

import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedcore.errors import ModelError
from pagedcore.sources.gguf_convert import convert
from pagedcore.sources.gguf_reader import MAX_ENTRIES, MAX_ITEMS, GgufFile

MOST_MEMORY = 16 << 20
"""Bytes that reading a file of a few kilobytes may take; a table for 2^60 items does not fit."""


def open_bytes(tmp_path, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return GgufFile.open(path)


def convert_bytes(tmp_path, data):
    """Convert into a folder of its own, and refuse to take much memory for it."""
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    tracemalloc.start()
    try:
        convert(path, folder, lambda done, total: None)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MOST_MEMORY


def refusal(read, tmp_path, data):
    """What a file is refused for, or None for one that is read. Other exceptions are raised."""
    try:
        read(tmp_path, data)
    except ModelError as error:
        return str(error)
    return None


def replaced(data, at, code, value):
    raw = struct.pack(f"<{code}", value)
    return data[:at] + raw + data[at + len(raw) :]


def test_a_sound_file_converts(tmp_path, tiny_bytes):
    convert_bytes(tmp_path, tiny_bytes[1])
    names = {path.name for path in (tmp_path / "folder").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_file_cut_off_at_any_field_is_refused(tmp_path, tiny_bytes, beyond):
    fields, data = tiny_bytes
    for what, at, _ in fields:
        reason = refusal(open_bytes, tmp_path, data[: at + beyond])
        assert "bytes left where" in reason, what


def test_a_file_whose_last_tensor_is_cut_off_is_refused(tmp_path, tiny_bytes):
    with pytest.raises(ModelError, match="it is cut off"):
        open_bytes(tmp_path, tiny_bytes[1][:-1])


@pytest.mark.parametrize("value", [2**60, 2**63, 2**64 - 1, 2**32])
def test_no_count_or_length_or_offset_is_believed(tmp_path, tiny_bytes, value):
    fields, data = tiny_bytes
    for what, at, code in fields:
        if code == "Q":
            assert refusal(convert_bytes, tmp_path, replaced(data, at, code, value)), what


@pytest.mark.parametrize("value", [2**32 - 1, 2**31, 255])
def test_no_type_or_rank_or_version_is_believed(tmp_path, tiny_bytes, value):
    fields, data = tiny_bytes
    for what, at, code in fields:
        if code == "I" and what.startswith(("type", "item type", "rank", "tensor type", "version")):
            assert refusal(open_bytes, tmp_path, replaced(data, at, code, value)), what


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_flipped_bits_give_a_model_or_a_model_error(tmp_path, tiny_bytes, draw):
    fields, sound = tiny_bytes
    data = bytearray(sound)
    header = fields[-1][1] + 8  # behind it come values, and any value is a value
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(4, header - 1))
        data[at] ^= 1 << draw.draw(st.integers(0, 7))
    reason = refusal(convert_bytes, tmp_path, bytes(data)) or ""
    assert len(reason) < 2000
    assert "\n" not in reason


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_overwritten_numbers_give_a_model_or_a_model_error(tmp_path, tiny_bytes, draw):
    fields, data = tiny_bytes
    for _ in range(draw.draw(st.integers(1, 3))):
        _, at, code = draw.draw(st.sampled_from(fields))
        raw = draw.draw(st.binary(min_size=struct.calcsize(code), max_size=struct.calcsize(code)))
        data = data[:at] + raw + data[at + len(raw) :]
    assert len(refusal(convert_bytes, tmp_path, data) or "") < 2000


@given(st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_behind_the_magic_is_refused(tmp_path, noise):
    with pytest.raises(ModelError):
        open_bytes(tmp_path, b"GGUF" + noise)


@pytest.mark.parametrize("data", [b"", b"GGU", b"PK\x03\x04 a zip", b"GGML" + bytes(100)])
def test_what_is_no_gguf_is_named_so(tmp_path, data):
    with pytest.raises(ModelError, match="is no GGUF file"):
        open_bytes(tmp_path, data)


def test_a_folder_or_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ModelError, match="cannot be read"):
            GgufFile.open(path)


@pytest.mark.parametrize("version", [0, 1, 4])
def test_other_versions_are_refused(tmp_path, writer, version):
    writer.version = version
    with pytest.raises(ModelError, match=f"has GGUF version {version}"):
        open_bytes(tmp_path, writer.build())


def test_a_big_endian_file_is_named_so(tmp_path, writer):
    with pytest.raises(ModelError, match="is big-endian"):
        open_bytes(tmp_path, b"GGUF" + struct.pack(">I", 3) + writer.build()[8:])


def test_a_key_twice_is_refused(tmp_path, writer):
    writer.pairs = [("a", 1, None), ("a", 2, None)]
    with pytest.raises(ModelError, match="has the metadata key 'a' twice"):
        open_bytes(tmp_path, writer.build())


def test_a_tensor_twice_is_refused(tmp_path, tiny):
    name = "output_norm.weight"
    tiny.tensors.append(next(tensor for tensor in tiny.tensors if tensor[0] == name))
    with pytest.raises(ModelError, match=f"has the tensor '{name}' twice"):
        open_bytes(tmp_path, tiny.build())


@pytest.mark.parametrize("offset", [0, 32])
def test_overlapping_tensors_are_refused(tmp_path, tiny, offset):
    with pytest.raises(ModelError, match="overlap"):
        open_bytes(tmp_path, tiny.build(offsets={"output_norm.weight": offset}))


def test_an_offset_that_is_not_aligned_is_refused(tmp_path, tiny):
    with pytest.raises(ModelError, match="no multiple of 32"):
        open_bytes(tmp_path, tiny.build(offsets={"output_norm.weight": 33}))


@pytest.mark.parametrize("alignment", [0, 1, 24, "32"])
def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path, tiny, alignment):
    tiny.set("general.alignment", alignment)
    with pytest.raises(ModelError, match=r"general\.alignment"):
        open_bytes(tmp_path, tiny.build())


def test_another_alignment_is_kept(tmp_path, tiny):
    tiny.alignment = 256
    tiny.set("general.alignment", 256)
    convert_bytes(tmp_path, tiny.build())
    offsets = {
        tensor.offset % 256 for tensor in GgufFile.open(tmp_path / "x.gguf").tensors.values()
    }
    assert offsets == {0}


def test_an_unknown_tensor_type_is_named_with_those_that_are_read(tmp_path, writer):
    writer.tensor("w", bytes(64), 16, shape=(256,))
    with pytest.raises(ModelError, match=r"'w' has ggml's tensor type 16; those read are .*Q4_K"):
        open_bytes(tmp_path, writer.build())


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path, writer):
    writer.tensor("w", bytes(34), 8, shape=(2, 16))
    with pytest.raises(ModelError, match="not whole blocks of 32 as Q8_0 needs"):
        open_bytes(tmp_path, writer.build())


def test_an_empty_shape_is_refused(tmp_path, writer):
    writer.tensor("w", b"", 0, shape=(4, 0))
    with pytest.raises(ModelError, match="has the empty shape"):
        open_bytes(tmp_path, writer.build())


def test_sizes_whose_product_overflows_are_refused(tmp_path, writer):
    writer.tensor("w", bytes(32), 0, shape=(2**32, 2**31, 2))  # 2^66 bytes are 4 modulo 2^64
    with pytest.raises(ModelError, match="it is cut off"):
        open_bytes(tmp_path, writer.build())


def test_text_that_is_not_utf8_is_refused(tmp_path, writer):
    writer.set("general.name", b"\xff\xfe")
    with pytest.raises(ModelError, match="not UTF-8"):
        open_bytes(tmp_path, writer.build())


def test_arrays_within_arrays_are_refused(tmp_path, writer):
    writer.set("x", ["a"])
    data = writer.build()
    at = next(at for what, at, _ in writer.fields if what == "item type of x")
    with pytest.raises(ModelError, match="arrays within the array 'x'"):
        open_bytes(tmp_path, replaced(data, at, "I", 9))


def test_more_entries_or_items_than_any_model_has_are_refused(tmp_path, writer):
    data = writer.build() + bytes(64 * (MAX_ENTRIES + 1))
    for field, count in ((1, MAX_ENTRIES + 1), (2, MAX_ENTRIES + 1)):
        with pytest.raises(ModelError, match="are allowed"):
            open_bytes(tmp_path, replaced(data, writer.fields[field][1], "Q", count))
    writer.set("x", ["a"])
    data = writer.build() + bytes(8 * (MAX_ITEMS + 2))
    at = next(at for what, at, _ in writer.fields if what == "items of x")
    with pytest.raises(ModelError, match="are allowed"):
        open_bytes(tmp_path, replaced(data, at, "Q", MAX_ITEMS + 1))


def test_a_name_of_a_megabyte_is_refused_and_not_repeated(tmp_path, writer):
    writer.set("k" * (1 << 20), 1)
    with pytest.raises(ModelError, match="has a metadata key of 1048576 bytes") as caught:
        open_bytes(tmp_path, writer.build())
    assert len(str(caught.value)) < 500


def test_every_type_of_value_is_read(tmp_path, writer):
    values = {
        "u8": (200, 0), "i8": (-5, 1), "u16": (60000, 2), "i16": (-6, 3), "u32": (2**32 - 1, 4),
        "i32": (-7, 5), "f32": (0.5, 6), "bool": (True, 7), "string": ("é", 8),
        "u64": (2**64 - 1, 10), "i64": (-(2**63), 11), "f64": (0.1, 12),
    }  # fmt: skip
    for key, (value, kind) in values.items():
        writer.set(key, value, kind)
    metadata = open_bytes(tmp_path, writer.build()).metadata
    assert metadata == {key: value for key, (value, _) in values.items()}
    assert metadata["bool"] is True
