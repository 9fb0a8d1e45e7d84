"""Random weights for a config.json alone: `load_format=dummy`, to measure speed without a download.

Never zeros: hardware spends less power on those, and figures taken with them are too good.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagedcore.execution.checkpoint import config_dtype, read_config
from pagedcore.execution.shard import Share

DEVIATION = 0.02
"""Standard deviation of all weights: what most models are initialised with."""

EXPONENTS = 119, 122
"""Powers of two, plus 127, that count float4: from the first to before the second."""


class RandomWeights:
    """`Weights` that hold any tensor, drawn from N(0, 0.02); the weights of norms from N(1, 0.02).

    A tensor depends on its name and the seed, not on the order of the calls, and on the kind of
    device. Whole numbers, which quantized formats ask for, are uniform; exponents, whose names end
    in `_scales`, let numbers of float4 be about as large as others.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.num_bytes = 0
        """Bytes of all tensors that were taken."""
        self.dtype = dtype
        self._device = device
        self._seed = seed

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
        assert dim is None or 0 <= dim < len(shape), f"{name} has no dimension {dim}"
        tensor = torch.empty(tuple(shape), dtype=dtype or self.dtype, device=self._device)
        self.num_bytes += tensor.nbytes
        if not tensor.is_meta:
            self._fill(tensor, name)
        return tensor

    def divide(self, layer: str, share: Share | None) -> None:
        """See `Weights.divide`: a single rank has everything."""

    def ignore(self, prefix: str) -> None:
        """See `Weights.ignore`."""

    def finish(self) -> None:
        """Nothing was opened."""

    def _fill(self, tensor: Tensor, name: str) -> None:
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:6], "little"))
        if not tensor.is_floating_point():
            if name.endswith("_scales"):
                tensor.random_(*EXPONENTS, generator=generator)
            else:
                tensor.random_(generator=generator)
            return
        is_norm = name.endswith("norm.weight") or (tensor.ndim == 1 and name.endswith(".weight"))
        mean = 1.0 if is_norm else 0.0
        if tensor.dtype.itemsize > 1:
            tensor.normal_(mean, DEVIATION, generator=generator)
        else:  # a type to store numbers in, without arithmetic
            wide = torch.empty(tensor.shape, dtype=torch.float32, device=self._device)
            tensor.copy_(wide.normal_(mean, DEVIATION, generator=generator))


class RandomCheckpoint:
    """A folder that needs to hold nothing but a config.json; otherwise like a `Checkpoint`."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Raises ModelError unless config.json is one JSON object."""
        self.folder = folder
        self.config: Mapping[str, Any] = read_config(folder)
        self._seed = seed
        self._shapes: RandomWeights | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that were asked of the last `shapes`."""
        return 0 if self._shapes is None else self._shapes.num_bytes

    @property
    def dtype(self) -> torch.dtype:
        """The model's float type: what config.json says, or else float32."""
        return config_dtype(self.config) or torch.float32

    def shapes(self, dtype: torch.dtype) -> RandomWeights:
        """Weights without content, for a model that computes in `dtype`."""
        self._shapes = RandomWeights(dtype, torch.device("meta"), self._seed)
        return self._shapes

    def check_all_taken(self) -> None:
        """Nothing is missing, nothing left over."""

    def tensors(self, dtype: torch.dtype, device: torch.device) -> RandomWeights:
        """Weights for a model that computes in `dtype` on `device`."""
        return RandomWeights(dtype, device, self._seed)
