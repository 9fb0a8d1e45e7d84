"""A checkpoint of whatever tensors a model class asks for, where there is no reference."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagedcore.execution.model import Model, ModelBuild
from pagedcore.execution.quantizer import Unquantized
from pagedcore.execution.shard import Share
from pagedcore.execution.torch_ops import TorchOps

DEVIATION = 0.2
"""Of every tensor: large enough that each layer does something."""


def save_drawn_checkpoint(
    folder: Path, config: Mapping[str, Any], model_class: type[Model], dtype: torch.dtype
) -> None:
    """Save config.json, and random tensors in `dtype` of all names and shapes that are asked for.

    One-dimensional tensors whose name says "norm" are drawn around 1, all others around 0.
    """
    from safetensors.torch import save_file

    drawn = _Drawn(dtype)
    model_class(
        ModelBuild(
            config=config,
            weights=drawn,
            quantizer=Unquantized(),
            ops=TorchOps("cpu"),
            dtype=dtype,
            device=torch.device("meta"),
            max_positions=256,
        )
    )
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    save_file(drawn.tensors, folder / "model.safetensors")


class _Drawn:
    """`Weights` on the device "meta"; draws what it is asked for beside."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """Any that is asked for."""
        return None

    def has(self, name: str) -> bool:
        """Nothing that a model could do without."""
        return False

    def take(
        self,
        name: str,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        dim: int | None = None,
    ) -> Tensor:
        """See `Weights.take`."""
        mean = 1.0 if len(shape) == 1 and "norm" in name else 0.0
        tensor = torch.empty(tuple(shape)).normal_(mean, DEVIATION, generator=self._generator)
        self.tensors[name] = tensor.to(dtype or self.dtype)
        return self.tensors[name].to("meta")

    def divide(self, layer: str, share: Share | None) -> None:
        """See `Weights.divide`: a single rank has everything."""

    def ignore(self, prefix: str) -> None:
        """See `Weights.ignore`."""
