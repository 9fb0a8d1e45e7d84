"""Matrices of every stored format, divided between ranks: together they are the whole."""

import re

import pytest
import torch
from safetensors.torch import save_file

from pagedcore.errors import ModelError
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.divided import DividedQuantizer, DividedWeights
from pagedcore.execution.shard import Shard
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.rank_threads import run_ranks
from pagedcore.testing.written_formats import WRITTEN
from pagedcore_quantization import pagedcore_quantizers

ROWS, COLUMNS = {"a.q_proj": 256, "a.k_proj": 256}, 512

WHOLE = ["bitsandbytes nf4", "bitsandbytes nf4 nested"]
REORDERED = [form for form in WRITTEN if form.endswith("reordered")]
DIVIDED = [form for form in WRITTEN if form not in WHOLE]


@pytest.fixture
def stored(request, tmp_path):
    """A format, and a folder with two matrices of it."""
    form, folder = request.param, tmp_path
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rows in ROWS.items():
        written, _ = WRITTEN[form].write(torch.randn(rows, COLUMNS, generator=generator))
        tensors |= {f"{name}.{what}": tensor for what, tensor in written.items()}
    (folder / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return form, folder


def load(stored, shard, dim, names=tuple(ROWS), device="cpu"):
    form, folder = stored
    config = WRITTEN[form].config
    quantizer = pagedcore_quantizers()[config["quant_method"]](config)
    checkpoint = Checkpoint(folder)
    meta = checkpoint.shapes(torch.float32)
    weights = meta if device == "meta" else checkpoint.tensors(torch.float32, torch.device(device))
    if shard.size > 1:
        weights, quantizer = DividedWeights(weights, shard), DividedQuantizer(quantizer, shard)
        for name in names:  # as `Linear` does
            weights.divide(name, shard.even(name, COLUMNS if dim else ROWS[name]))
    rows = [ROWS[name] for name in names]
    return quantizer.linear(weights, TorchOps("cpu"), names, COLUMNS, rows, bias=False, dim=dim)


@pytest.mark.parametrize("stored", DIVIDED, indirect=True)
def test_ranks_have_the_outputs_of_the_whole(stored):
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    query, key = load(stored, Shard(), 0).apply(x).chunk(2, 1)
    parts = run_ranks(2, lambda shard: load(stored, shard, 0).apply(x))
    for half, found in zip((0, 1), parts, strict=True):
        expected = torch.cat([query.chunk(2, 1)[half], key.chunk(2, 1)[half]], 1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stored", [f for f in DIVIDED if f not in REORDERED], indirect=True)
def test_ranks_with_a_part_of_the_inputs_add_up_to_the_whole(stored):
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    names = ["a.q_proj"]
    expected = load(stored, Shard(), 1, names).apply(x)

    def run(shard):
        part = x.chunk(2, 1)[shard.rank].contiguous()
        return load(stored, shard, 1, names).apply(part)

    # in 8 bits on both sides, each rank rounds its own inputs
    close = 1.5 if stored[0] == "int8 w8a8" else 1e-3
    for found in run_ranks(2, run):
        torch.testing.assert_close(found, expected, atol=close, rtol=1e-3)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("stored", DIVIDED, indirect=True)
def test_shapes_alone_are_divided_like_weights(stored, dim):
    load(stored, Shard(1, 2), dim, device="meta")


@pytest.mark.parametrize("stored", REORDERED, indirect=True)
def test_inputs_in_another_order_cannot_be_divided(stored):
    with pytest.raises(ModelError, match=r"a\.q_proj\.\w*g_idx.*desc_act.*must be 1"):
        load(stored, Shard(1, 2), 1)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("stored", WHOLE, indirect=True)
def test_a_format_without_rows_says_that_it_cannot_be_divided(stored, dim):
    with pytest.raises(ModelError, match=r"a\.q_proj\.weight.*one run of blocks.*must be 1"):
        load(stored, Shard(1, 2), dim, device="meta")


@pytest.mark.parametrize(
    ("stored", "dim", "ranks", "pieces", "allowed"),
    [
        ("fp8 blocks", 1, 8, "128", "one of 1, 2, 4"),
        ("fp8 blocks", 0, 4, "128", "one of 1, 2"),
        ("gptq 4", 1, 32, "32", "one of 1, 2, 4, 8, 16"),
        ("awq", 0, 64, "8", "one of 1, 2, 4, 8, 16, 32"),
    ],
    indirect=["stored"],
)
def test_no_rank_gets_a_part_of_a_group(stored, dim, ranks, pieces, allowed):
    words = f"pieces of {pieces}, and a rank would get only a part of one: .* {allowed}"
    with pytest.raises(ModelError, match=words + "$") as caught:
        load(stored, Shard(1, ranks), dim, device="meta")
    assert re.match(r"'a\.q_proj\.", str(caught.value))
