"""Weight formats, by the names that `--quantization` and checkpoints give them.

fp8.py      fp8: 16-bit weights rounded to 8 bits while they are loaded; and how 8 bits multiply
stored.py   weights that a checkpoint holds in 8 bits: fp8, compressed-tensors, fbgemm_fp8
formats.py  the quantization_config that such a checkpoint has
modules.py  the layers that it names as left alone
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pagedcore import hookimpl

if TYPE_CHECKING:
    from pagedcore.execution.quantizer import Quantizer

pagedcore_requires = ">=1,<2"


@hookimpl
def pagedcore_quantizers() -> Mapping[str, Callable[[Mapping[str, Any]], "Quantizer"]]:
    """See `pagedcore.hookspecs`."""
    return {
        "fp8": _fp8,
        "compressed-tensors": _compressed_tensors,
        "fbgemm_fp8": _fbgemm_fp8,
    }


def _fp8(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.fp8 import Fp8
    from pagedcore_quantization.stored import StoredFp8

    return StoredFp8("fp8", settings) if settings else Fp8()


def _compressed_tensors(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.stored import StoredFp8

    return StoredFp8("compressed-tensors", settings)


def _fbgemm_fp8(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.stored import StoredFp8

    return StoredFp8("fbgemm_fp8", settings)
