"""Experts of stored formats, whose widths are divided between ranks: their sum is the whole."""

import pytest
import torch
from safetensors.torch import save_file

from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.divided import DividedQuantizer, DividedWeights
from pagedcore.execution.expert_ops import Clamp
from pagedcore.execution.quantizer import Unquantized
from pagedcore.execution.shard import Shard
from pagedcore.execution.stacked_experts import stacked_experts
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.rank_threads import run_ranks
from pagedcore.testing.written_formats import WRITTEN
from pagedcore_quantization import pagedcore_quantizers

E, H, F = 3, 128, 256
FORMS = ["fp8 by output", "fp8 blocks", "awq", "gptq 4", "gptq 4 by output", "compressed 4"]


def mixed(folder, shard, take):
    """What the experts that `take` takes make of some tokens, as one of several ranks."""
    weights = Checkpoint(folder).tensors(torch.float32, torch.device("cpu"))
    if shard.size > 1:
        weights = DividedWeights(weights, shard)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, H, generator=generator)
    chosen = torch.randint(0, E, (5, 2), generator=generator, dtype=torch.int32)
    return take(weights, shard).apply(x, torch.rand(5, 2, generator=generator), chosen)


def of_ranks(quantizer, shard):
    return quantizer if shard.size == 1 else DividedQuantizer(quantizer, shard)


@torch.inference_mode()
@pytest.mark.parametrize("form", FORMS)
def test_ranks_add_up_to_the_experts_of_a_format(form, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for e in range(E):
        for part, shape in (("gate", (F, H)), ("up", (F, H)), ("down", (H, F))):
            written, _ = WRITTEN[form].write(0.1 * torch.randn(shape, generator=generator))
            tensors |= {f"x.{e}.{part}_proj.{what}": t for what, t in written.items()}
    (tmp_path / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    save_file(tensors, tmp_path / "model.safetensors")
    config = WRITTEN[form].config

    def take(weights, shard):
        quantizer = of_ranks(pagedcore_quantizers()[config["quant_method"]](config), shard)
        return quantizer.experts(weights, TorchOps("cpu"), "x", E, H, F)

    whole = mixed(tmp_path, Shard(), take)
    for found in run_ranks(2, lambda shard: mixed(tmp_path, shard, take)):
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("form", ["mxfp4", "none"])
def test_ranks_add_up_to_stacked_experts(form, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (2 * F, H), "down_proj": (H, F)}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"x.{name}_bias"] = torch.randn(E, rows, generator=generator)
        if form == "none":
            tensors[f"x.{name}"] = 0.1 * torch.randn(E, columns, rows, generator=generator)
            continue
        stored = (E, rows, columns // 32, 16)
        tensors[f"x.{name}_blocks"] = torch.randint(
            0, 256, stored, generator=generator, dtype=torch.uint8
        )
        tensors[f"x.{name}_scales"] = torch.randint(
            121, 124, stored[:3], generator=generator, dtype=torch.uint8
        )
    (tmp_path / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    save_file(tensors, tmp_path / "model.safetensors")

    def take(weights, shard):
        quantizer = (
            Unquantized()
            if form == "none"
            else pagedcore_quantizers()[form]({"quant_method": "mxfp4"})
        )
        ops = TorchOps("cpu")
        sizes = E, H, F, Clamp(1.7, 7.0)
        return stacked_experts(of_ranks(quantizer, shard), weights, ops, "x", *sizes)

    whole = mixed(tmp_path, Shard(), take)
    for found in run_ranks(2, lambda shard: mixed(tmp_path, shard, take)):
        torch.testing.assert_close(found, whole, atol=1e-3, rtol=1e-4)
