"""Files that lie are refused, by name, before anything is allocated (reliability IN-45, IN-46)."""

import json
import resource
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from pagedcore.errors import ModelError
from pagedcore.execution.checkpoint import Checkpoint, find_tensors
from pagedcore.execution.safetensors_file import MAX_HEADER_BYTES, read_header


def file_of(header, data=b"", *, length=None):
    """The bytes of a file with this header, a dict or raw bytes, and this data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = file_of({"a": entry(0, 16), "b": entry(16, 32)}, bytes(32))

EVIL = {
    "empty": (b"", "has 0 bytes"),
    "shorter than a length": (b"\x01\x00", "has 2 bytes"),
    "header longer than the file": (file_of({}, length=1000), "a header that needs 1008"),
    "header length that overflows": (file_of({}, length=2**64 - 1), f"needs {2**64 + 7}"),
    "header that is no JSON": (file_of(b"\x80\x04pickle"), "a header that safetensors does not"),
    "header that is no object": (file_of(b"[1, 2]"), "Expected `object`"),
    "header that is not UTF-8": (file_of(b'{"\xff\xfe": {}}'), "does not allow"),
    "header that nests deeply": (file_of(b'{"a":' + b"[" * 500_000), "does not allow"),
    "cut off": (GOOD[:-1], "is cut off: it has"),
    "with bytes behind the last tensor": (GOOD + b"x", "its tensors end at"),
    "with a hole": (
        file_of({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36)),
        "lets 'b' follow a hole",
    ),
    "with tensors that overlap": (
        file_of({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
        "lets 'b' overlap",
    ),
    "with two tensors in one place": (
        file_of({"a": entry(0, 16), "b": entry(0, 16)}, bytes(16)),
        "lets 'b' overlap",
    ),
    "with a tensor named twice": (
        file_of(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        "names a tensor twice",
    ),
    "with offsets beyond the file": (
        file_of({"a": entry(0, 4 * 2**50, [2**50])}, bytes(16)),
        "is cut off",
    ),
    "with offsets in the wrong order": (file_of({"a": entry(16, 0)}, bytes(16)), "gives 'a' -16"),
    "with a negative offset": (file_of({"a": entry(-16, 0)}, bytes(16)), "Expected `int` >= 0"),
    "with a fractional offset": (file_of({"a": entry(0, 16.5)}, bytes(16)), "does not allow"),
    "with a shape that overflows": (
        file_of({"a": entry(0, 16, [2**33, 2**33])}, bytes(16)),
        "gives 'a' 16 bytes",
    ),
    "with an absurd size": (file_of({"a": entry(0, 16, [2**70])}, bytes(16)), "does not allow"),
    "with a negative size": (file_of({"a": entry(0, 16, [-4])}, bytes(16)), "Expected `int` >= 0"),
    "with too many dimensions": (file_of({"a": entry(0, 4, [1] * 9)}, bytes(4)), "length <= 8"),
    "with a shape of other size": (file_of({"a": entry(0, 16, [5])}, bytes(16)), "is 20"),
    "with an unknown type": (file_of({"a": entry(0, 16, dtype="PY")}, bytes(16)), "type 'PY'"),
    "with a missing field": (file_of({"a": {"dtype": "F32", "shape": [4]}}), "data_offsets"),
    "with an unknown field": (
        file_of({"a": entry(0, 16) | {"code": "x"}}, bytes(16)),
        "unknown field `code`",
    ),
    "with metadata that is no text": (file_of({"__metadata__": {"a": 1}}), "Expected `str`"),
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def memory():
    """Fail when a test took more memory than a small multiple of the small files here."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 64 << 20


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(("content", "offence"), EVIL.values(), ids=EVIL)
@pytest.mark.timeout(10)
def test_a_file_that_lies_is_refused(write, content, offence):
    path = write(content)
    with pytest.raises(ModelError) as error:
        read_header(path)
    assert str(error.value).startswith(str(path))
    assert offence in str(error.value)
    assert str(error.value).endswith("Fetch the model again, or take another.")


def test_a_good_file_is_read(write):
    tensors = read_header(write(GOOD))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (4,), "b": (4,)}
    assert tensors["b"].offset == len(GOOD) - 16


@pytest.mark.usefixtures("memory")
@pytest.mark.timeout(10)
def test_a_header_of_100_mb_is_refused_unread(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100 << 20))
        file.truncate(200 << 20)  # sparse: it takes no disk
    with pytest.raises(ModelError, match=f"{MAX_HEADER_BYTES} are read"):
        read_header(path)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match="is no file"):
        read_header(tmp_path / "model.safetensors")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_read_as_a_whole_or_refused(tmp_path_factory, data):
    """Any byte changed, any length: a ModelError, or tensors that lie within the file."""
    content = bytearray(save({"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except ModelError:
        return
    assert all(t.offset + t.num_bytes <= len(content) for t in tensors.values())


def sharded(tmp_path, weight_map, *shards):
    for shard in shards:
        (tmp_path / shard).write_bytes(GOOD)
    index = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin", "a\x00b"],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(GOOD)
    with pytest.raises(ModelError, match="which is no safetensors file beside it"):
        find_tensors(sharded(folder, {"a": name}))


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": {"a": 1}}', "{" * 100_000, '{"weight_map": []}']
)
def test_an_index_that_is_none_is_refused(tmp_path, index):
    with pytest.raises(ModelError, match=r"index\.json is no index of shards"):
        find_tensors(sharded(tmp_path, index))


def test_missing_shards_are_listed(tmp_path):
    places = {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}
    with pytest.raises(
        ModelError, match=r"lacks 2 of 3 shards: '2\.safetensors', '3\.safetensors'"
    ):
        find_tensors(sharded(tmp_path, places, "1.safetensors"))


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path):
    with pytest.raises(
        ModelError, match=r"looks for 'c' in 1\.safetensors, which does not hold it"
    ):
        find_tensors(
            sharded(tmp_path, {"a": "1.safetensors", "c": "1.safetensors"}, "1.safetensors")
        )


def test_a_folder_of_pickles_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which is not read"):
        find_tensors(tmp_path)


def test_a_folder_without_weights_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ModelError, match="load_format=dummy"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "{" * 100_000, '{"a": }'])
def test_a_config_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    with pytest.raises(ModelError, match=r"config\.json must hold a JSON object"):
        Checkpoint(tmp_path)


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        Checkpoint(tmp_path)
