"""Weight formats, by the names that `--quantization` and checkpoints give them.

fp8.py           16-bit weights rounded to float8 while they are loaded; and how those multiply
stored.py        float8 weights of a checkpoint: fp8, fbgemm_fp8, and a part of compressed-tensors
compressed.py    compressed-tensors: floats, whole numbers or packed words, as schemes.py reads
gptq.py, awq.py  codes of 4 or 8 bits in words
bitsandbytes.py  NF4, FP4 and INT8, without that library
mxfp4.py         experts of GPT-OSS in 4 bits
gguf.py          blocks of GGUF files, kept as they are
packed.py        what formats of few bits share: parts become a matrix
experts.py       experts of a layer become one weight, or are widened
writers.py       matrices in these formats, for `pagedcore quantize`
int8.py          whole numbers on both sides of a product
formats.py       the quantization_config that a checkpoint has
modules.py       the layers that it names
cases.py         what formats promise of error and size
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pagedcore import hookimpl

if TYPE_CHECKING:
    from pagedcore.execution.quantizer import Quantizer
    from pagedcore.execution.quantizing.writer import WeightWriter, WriterOptions
    from pagedcore.testing.quantizer_case import QuantizerCase

pagedcore_requires = ">=1,<2"


@hookimpl
def pagedcore_quantizers() -> Mapping[str, Callable[[Mapping[str, Any]], "Quantizer"]]:
    """See `pagedcore.hookspecs`."""
    return {
        "awq": _awq,
        "bitsandbytes": _bitsandbytes,
        "compressed-tensors": _compressed_tensors,
        "fbgemm_fp8": _fbgemm_fp8,
        "fp8": _fp8,
        "gguf": _gguf,
        "gptq": _gptq,
        "mxfp4": _mxfp4,
    }


@hookimpl
def pagedcore_quantizer_cases() -> Mapping[str, "QuantizerCase"]:
    """See `pagedcore.hookspecs`."""
    from pagedcore_quantization.cases import CASES

    return CASES


@hookimpl
def pagedcore_weight_writers() -> Mapping[str, Callable[["WriterOptions"], "WeightWriter"]]:
    """See `pagedcore.hookspecs`."""
    return {
        "awq": _write_awq,
        "fp8": _write_fp8,
        "fp8-block": _write_fp8_block,
        "gptq": _write_gptq,
        "int8": _write_int8,
    }


def _fp8(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.formats import read_format
    from pagedcore_quantization.fp8 import Fp8
    from pagedcore_quantization.stored import StoredFp8

    return StoredFp8("fp8", read_format("fp8", settings)) if settings else Fp8()


def _fbgemm_fp8(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.formats import read_format
    from pagedcore_quantization.stored import StoredFp8

    return StoredFp8("fbgemm_fp8", read_format("fbgemm_fp8", settings))


def _compressed_tensors(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.compressed import CompressedTensors

    return CompressedTensors("compressed-tensors", settings)


def _awq(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.awq import Awq

    return Awq("awq", settings)


def _gptq(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.gptq import Gptq

    return Gptq("gptq", settings)


def _bitsandbytes(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.bitsandbytes import BitsAndBytes

    return BitsAndBytes("bitsandbytes", settings)


def _gguf(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.gguf import Gguf

    return Gguf("gguf", settings)


def _mxfp4(settings: Mapping[str, Any]) -> "Quantizer":
    from pagedcore_quantization.mxfp4 import Mxfp4

    return Mxfp4(settings)


def _write_awq(options: "WriterOptions") -> "WeightWriter":
    from pagedcore_quantization.writers import AwqWriter

    return AwqWriter(options)


def _write_fp8(options: "WriterOptions") -> "WeightWriter":
    from pagedcore_quantization.writers import Fp8Writer

    return Fp8Writer(options)


def _write_fp8_block(options: "WriterOptions") -> "WeightWriter":
    from pagedcore_quantization.writers import Fp8BlockWriter

    return Fp8BlockWriter(options)


def _write_gptq(options: "WriterOptions") -> "WeightWriter":
    from pagedcore_quantization.writers import GptqWriter

    return GptqWriter(options)


def _write_int8(options: "WriterOptions") -> "WeightWriter":
    from pagedcore_quantization.writers import Int8Writer

    return Int8Writer(options)
