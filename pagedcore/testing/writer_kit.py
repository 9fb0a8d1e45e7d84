"""Holds a writer of a weight format to what it says of itself: a quantizer must read it."""

import tempfile
from pathlib import Path

import torch

from pagedcore.errors import PluginError
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.quantizing.shards import write_json, write_tensors
from pagedcore.execution.quantizing.writer import WeightWriter
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.plugins import choose, load_plugins

_NAME = "model.layers.0.mlp.down_proj"
_ROWS, _COLUMNS = 128, 256
_TOLERANCE = 0.02  # of the largest number: products may round inputs to 8 bits


def check_writer(writer: WeightWriter) -> str:
    """Store a matrix, and compare how it is read with `rounded`; returns the error of rounding.

    Raises PluginError where they differ, and what a quantizer raises that cannot read it.
    """
    weight = torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0))
    writer.check(_NAME, _ROWS, _COLUMNS)
    rounded = writer.rounded(weight.clone())
    settings = writer.config(["lm_head"])
    make = choose(load_plugins(), "pagedcore_quantizers", str(settings["quant_method"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = writer.write(weight.clone())
        stored = {f"{_NAME}.{what}": tensor for what, tensor in tensors.items()}
        write_tensors(folder / "model.safetensors", stored)
        write_json(folder / "config.json", {"dtype": "float32"})
        weights = Checkpoint(folder).tensors(torch.float32, torch.device("cpu"))
        method = make(settings).linear(
            weights, TorchOps("cpu"), [_NAME], _COLUMNS, [_ROWS], bias=False, dim=None
        )
        read = method.apply(torch.eye(_COLUMNS)).t()
        weights.finish()
    largest = float(weight.abs().max())
    if not float((read - rounded).abs().max()) <= _TOLERANCE * largest:
        raise PluginError("what it writes is not read as what `rounded` says")
    error = float((rounded - weight).norm() / weight.norm())
    return f"error {error:.4f} of a random matrix"
