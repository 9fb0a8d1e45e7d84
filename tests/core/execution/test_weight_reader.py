"""Tensors arrive whole, in whatever order they are read, and however they are cut."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pagedcore.errors import ModelError
from pagedcore.execution import weight_reader
from pagedcore.execution.safetensors_file import read_header
from pagedcore.execution.weight_reader import WeightReader

CPU = torch.device("cpu")
SIZES = [1, 999, 1000, 1001, 0, 5000, 64, 12345, 3, 2000]


@pytest.fixture
def small_pieces(monkeypatch):
    """Few buffers of few bytes, so that small tensors meet every border."""
    monkeypatch.setattr(weight_reader, "PIECE_BYTES", 1000)
    monkeypatch.setattr(weight_reader, "NUM_BUFFERS", 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for i, size in enumerate(SIZES)
    }
    save_file(tensors, path)
    return tensors, read_header(path)


@pytest.mark.usefixtures("small_pieces")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    order=st.permutations(range(len(SIZES))),
    asked=st.lists(st.integers(0, len(SIZES) - 1), max_size=12),
    ahead=st.booleans(),
)
def test_any_order_gives_the_same_tensors(saved, order, asked, ahead):
    """Known or not: what was read ahead in vain is read again."""
    tensors, stored = saved
    reader = WeightReader(CPU, [stored[f"t{i}"] for i in order], ahead=ahead)
    for i in asked or order:
        assert torch.equal(reader.read(stored[f"t{i}"]), tensors[f"t{i}"])
    reader.close()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("ahead", [False, True])
def test_a_file_that_ends_early_is_an_error_however_it_is_read(tmp_path, ahead):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(5000, dtype=torch.uint8)}, path)
    stored = read_header(path)["a"]
    with path.open("r+b") as file:
        file.truncate(3000)
    reader = WeightReader(CPU, [stored], ahead=ahead)
    with pytest.raises(ModelError, match="became shorter while it was read"):
        reader.read(stored)
    reader.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("known", [False, True])
def test_a_gpu_gets_the_same_bytes(saved, known):
    tensors, stored = saved
    device = torch.device("cuda:0")
    reader = WeightReader(device, list(stored.values()) if known else [])
    read = {name: reader.read(stored[name]) for name in stored}
    reader.close()
    assert all(torch.equal(read[name].cpu(), tensors[name]) for name in tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_tensors_of_many_pieces(tmp_path):
    path = tmp_path / "model.safetensors"
    tensor = torch.arange(150 << 20, dtype=torch.int32)  # more than all buffers hold
    save_file({"a": tensor, "b": tensor.flip(0)}, path)
    stored = read_header(path)
    reader = WeightReader(torch.device("cuda:0"), [stored["a"], stored["b"]])
    assert torch.equal(reader.read(stored["a"]).cpu(), tensor)
    assert torch.equal(reader.read(stored["b"]).cpu(), tensor.flip(0))
    reader.close()
