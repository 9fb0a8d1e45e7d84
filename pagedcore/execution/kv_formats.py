"""How the cache keeps keys and values: the formats that `kv_cache_dtype` names.

    ... any leading dimensions, one vector for each   D elements of a vector   C codes of them

A vector is the key or the value of one token in one kv head, or a latent vector (MLA).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import pluggy
import torch
from torch import Tensor

from pagedcore.errors import ConfigError
from pagedcore.plugins import choose

_LARGEST = 127
"""Of the whole numbers of 8 bits: the same on both sides of zero."""


class KVFormat(ABC):
    """A format: a factory in the `pagedcore_kv_formats` hook makes it, for the model's type.

    `encode` and `decode` are what a cache means, in plain torch: the backend `torch` runs them, and
    other backends have kernels that must agree, or refuse the format by its name. What is stored
    first is zeros, codes and scales, which must decode to numbers that are finite.
    """

    name: str
    """As in `--kv-cache-dtype`."""

    dtype: torch.dtype
    """Of the codes."""

    scale_dtype: torch.dtype | None = None
    """Of the scale that is stored beside each vector; None where there is none."""

    takes_latent: bool = False
    """Whether it is good enough for latent vectors, whose two parts differ in size."""

    max_error: float
    """Promised of vectors of normal numbers: root mean square, as a share of theirs."""

    def num_codes(self, size: int) -> int:
        """C, for vectors of D = `size` elements."""
        return size

    def vector_bytes(self, size: int) -> int:
        """Bytes of a vector of `size` elements, with its scale."""
        scale = 0 if self.scale_dtype is None else self.scale_dtype.itemsize
        return self.num_codes(size) * self.dtype.itemsize + scale

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether codes are the vectors themselves, for vectors of this type."""
        return False

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Vectors x [..., D] of any float type as codes [..., C] and, with a scale, scales [...].

        A vector of zeros stays one. What comes of NaN is NaN: in its place, or the whole vector.
        """

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What `encode` made, as vectors [..., D] of `dtype`."""


class Cast(KVFormat):
    """Numbers as they are, in another type: rounded to it, and limited to what it can hold."""

    takes_latent = True

    def __init__(self, name: str, dtype: torch.dtype, max_error: float = 0.0) -> None:
        self.name = name
        self.dtype = dtype
        self.max_error = max_error
        self._limit = torch.finfo(dtype).max if dtype.itemsize == 1 else None

    def is_exact(self, dtype: torch.dtype) -> bool:
        """See `KVFormat.is_exact`."""
        return dtype == self.dtype

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `KVFormat.encode`. Of 8 bits, infinity is the largest number."""
        if self._limit is not None:  # beyond it a type of 8 bits knows only NaN
            x = x.clamp(-self._limit, self._limit)
        return x.to(self.dtype), None

    def decode(self, codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `KVFormat.decode`."""
        return codes.to(dtype)


class Int8(KVFormat):
    """Whole numbers up to 127, times a scale for each vector: its largest magnitude over 127.

    The scale is float32: in float16 it would save 2 bytes of a vector's 132 (at 128 elements), be
    no less exact, and end at 65,504. A vector with a number that is not finite becomes NaN.
    """

    name = "int8"
    dtype = torch.int8
    scale_dtype = torch.float32
    max_error = 0.008

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `KVFormat.encode`."""
        wide = x.float()
        scale = wide.abs().amax(-1) / _LARGEST  # NaN if one of them is
        whole = (wide / scale[..., None]).nan_to_num_(0.0, 0.0, 0.0).round_()
        codes = whole.clamp_(-_LARGEST, _LARGEST).to(self.dtype)
        return codes, scale.where(scale.isfinite(), torch.nan)

    def decode(self, codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `KVFormat.decode`."""
        assert scale is not None
        return (codes.float() * scale[..., None]).to(dtype)


def as_is(dtype: torch.dtype) -> Cast:
    """`auto`: the model's own type."""
    return Cast("auto", dtype)


def fp8(name: str = "fp8") -> Cast:
    """8 bits of which 4 are an exponent and 3 a fraction."""
    return Cast(name, torch.float8_e4m3fn, max_error=0.03)


def choose_kv_format(name: str, dtype: torch.dtype, plugins: pluggy.PluginManager) -> KVFormat:
    """The format of this name, for a model in `dtype`; raises UnknownNameError."""
    chosen: KVFormat = choose(plugins, "pagedcore_kv_formats", name)(dtype)
    return chosen


def no_kernels(backend: str, kv_format: KVFormat, known: Iterable[str]) -> ConfigError:
    """What a backend raises for a format that it cannot store."""
    return ConfigError(
        f"the backend {backend!r} has no kernels for the KV cache format {kv_format.name!r}: "
        f"it has {', '.join(sorted(known))}. Choose one of these, or backend='torch', which runs "
        "every format"
    )
