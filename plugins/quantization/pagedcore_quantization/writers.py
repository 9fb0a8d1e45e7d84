"""Writes matrices in our formats, each number rounded to the nearest that the format has.

    G groups of inputs that share a scale   w = 32 / bits codes in a word

What is written has the layout that the readers beside this module state in their heads. Scales are
rounded as they are stored before codes are chosen, so that both fit together.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pagedcore.errors import ConfigError
from pagedcore.execution.quantized import FLOAT8, GROUP_COLUMNS, LARGEST
from pagedcore.execution.quantizing.writer import WriterOptions
from pagedcore_quantization.awq import ORDER

DEFAULT_GROUP = 128
_SHARES = (1.0, 0.94, 0.88, 0.83)
"""Of the largest number: what 4 bits without a zero point may count as the largest."""

_LEAST_SCALE = 2.0**-14  # the smallest number of float16 that has all of its bits
_LEAST_WIDE = 1e-20  # of scales in float32: rows of zeros have one too


class Fp8Writer:
    """compressed-tensors, float8 with a scale for each output."""

    balances = False

    def __init__(self, options: WriterOptions) -> None:
        """Raises ConfigError for options that the format does not have."""
        _only(options, "fp8", bits=8)

    def config(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """See `WeightWriter.config`."""
        return _compressed("float-quantized", "float", kept)

    def check(self, name: str, rows: int, columns: int) -> None:
        """See `WeightWriter.check`: any sizes."""

    def write(self, weight: Tensor) -> Mapping[str, Tensor]:
        """See `WeightWriter.write`."""
        scale = _scale_of_rows(weight, LARGEST)
        return {"weight": _float8(weight / scale), "weight_scale": scale}

    def rounded(self, weight: Tensor) -> Tensor:
        """See `WeightWriter.rounded`."""
        scale = _scale_of_rows(weight, LARGEST)
        return _float8(weight / scale).float() * scale


class Fp8BlockWriter:
    """fp8 with a scale for each block of 128 by 128, as DeepSeek stores it."""

    balances = False

    def __init__(self, options: WriterOptions) -> None:
        """Raises ConfigError for options that the format does not have."""
        _only(options, "fp8-block", bits=8, group=GROUP_COLUMNS)

    def config(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """See `WeightWriter.config`."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [GROUP_COLUMNS, GROUP_COLUMNS],
            "modules_to_not_convert": list(kept),
        }

    def check(self, name: str, rows: int, columns: int) -> None:
        """See `WeightWriter.check`."""
        if rows % GROUP_COLUMNS or columns % GROUP_COLUMNS:  # as transformers wants them
            raise ConfigError(
                f"{name!r} has {rows} outputs and {columns} inputs, which are no whole number of "
                f"blocks of {GROUP_COLUMNS} by {GROUP_COLUMNS}: take fp8, which has none"
            )

    def write(self, weight: Tensor) -> Mapping[str, Tensor]:
        """See `WeightWriter.write`."""
        scale, each = _scale_of_blocks(weight)
        return {"weight": _float8(weight / each), "weight_scale_inv": scale}

    def rounded(self, weight: Tensor) -> Tensor:
        """See `WeightWriter.rounded`."""
        _, each = _scale_of_blocks(weight)
        return _float8(weight / each).float() * each


class Int8Writer:
    """compressed-tensors, whole numbers of 8 bits on both sides of a product (W8A8)."""

    balances = True

    def __init__(self, options: WriterOptions) -> None:
        """Raises ConfigError for options that the format does not have."""
        _only(options, "int8", bits=8)

    def config(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """See `WeightWriter.config`."""
        return _compressed("int-quantized", "int", kept)

    def check(self, name: str, rows: int, columns: int) -> None:
        """See `WeightWriter.check`: any sizes."""

    def write(self, weight: Tensor) -> Mapping[str, Tensor]:
        """See `WeightWriter.write`."""
        scale = _scale_of_rows(weight, 127)
        return {"weight": (weight / scale).round_().to(torch.int8), "weight_scale": scale}

    def rounded(self, weight: Tensor) -> Tensor:
        """See `WeightWriter.rounded`."""
        scale = _scale_of_rows(weight, 127)
        return (weight / scale).round_().mul_(scale)

    def rounded_inputs(self, x: Tensor) -> Tensor:
        """See `RoundsInputs.rounded_inputs`: as weights are rounded, a row at a time."""
        return self.rounded(x)


class GptqWriter:
    """The layout of GPTQ, symmetric: 4 or 8 bits."""

    balances = True

    def __init__(self, options: WriterOptions) -> None:
        """Raises ConfigError for options that the format does not have."""
        self._bits = 4 if options.bits is None else options.bits
        if self._bits not in (4, 8):
            raise ConfigError(f"--bits must be 4 or 8 in gptq, not {self._bits}")
        self._group = _group(options)

    def config(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """See `WeightWriter.config`."""
        return {
            "quant_method": "gptq",
            "bits": self._bits,
            "group_size": -1 if self._group is None else self._group,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "modules_to_not_convert": list(kept),
        }

    def check(self, name: str, rows: int, columns: int) -> None:
        """See `WeightWriter.check`."""
        _check(name, rows, columns, self._group, 32 // self._bits)

    def write(self, weight: Tensor) -> Mapping[str, Tensor]:
        """See `WeightWriter.write`."""
        codes, scale = self._codes(weight)
        rows, columns = weight.shape
        groups = scale.shape[1]
        middle = 2 ** (self._bits - 1)
        zeros = torch.full((groups, rows), middle - 1, dtype=torch.uint8)  # stored less one
        index = torch.arange(columns, dtype=torch.int32) // (columns // groups)
        return {
            "qweight": _words(codes, self._bits).t().contiguous(),
            "qzeros": _words(zeros, self._bits),
            "scales": scale.t().contiguous(),
            "g_idx": index,
        }

    def rounded(self, weight: Tensor) -> Tensor:
        """See `WeightWriter.rounded`."""
        codes, scale = self._codes(weight)
        middle = 2 ** (self._bits - 1)
        return (
            _by_group(codes.float().sub_(middle), scale).mul_(scale[:, :, None].float()).flatten(1)
        )

    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [out, in] uint8, and scales [out, G] float16."""
        runs = _runs(weight, self._group)
        most = 2**self._bits - 1
        # The largest number may lie half a step beyond the last code: so its error is no more than
        # that of others, and all steps are smaller. With few codes it pays to go further, and lose
        # more of the largest number than of all others together.
        largest = runs.abs().amax(-1) * (2 / most)
        scale, least = largest, torch.full_like(largest, torch.inf)
        for share in _SHARES if self._bits == 4 else (1.0,):
            tried = (largest * share).clamp_(min=_LEAST_SCALE).half().float()
            lost = self._steps(runs, tried).mul_(tried[:, :, None]).sub_(runs).square_().sum(-1)
            is_best = lost < least
            scale, least = torch.where(is_best, tried, scale), torch.where(is_best, lost, least)
        codes = self._steps(runs, scale).add_((most + 1) // 2)
        return codes.to(torch.uint8).flatten(1), scale.half()

    def _steps(self, runs: Tensor, scale: Tensor) -> Tensor:
        """Runs [out, G, n] in whole steps of their scales [out, G] float32."""
        half = 2 ** (self._bits - 1)
        return (runs / scale[:, :, None]).round_().clamp_(-half, half - 1)


class AwqWriter:
    """The layout of AWQ: 4 bits, with zero points."""

    balances = True

    def __init__(self, options: WriterOptions) -> None:
        """Raises ConfigError for options that the format does not have."""
        _only(options, "awq", bits=4, group=options.group_size)
        self._group = _group(options)

    def config(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """See `WeightWriter.config`."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": -1 if self._group is None else self._group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(kept),
        }

    def check(self, name: str, rows: int, columns: int) -> None:
        """See `WeightWriter.check`."""
        _check(name, rows, columns, self._group, 8)

    def write(self, weight: Tensor) -> Mapping[str, Tensor]:
        """See `WeightWriter.write`."""
        codes, scale, zero = self._codes(weight)
        return {
            "qweight": _words(_by_word(codes), 4),
            "qzeros": _words(_by_word(zero), 4),
            "scales": scale.t().contiguous(),
        }

    def rounded(self, weight: Tensor) -> Tensor:
        """See `WeightWriter.rounded`."""
        codes, scale, zero = self._codes(weight)
        runs = _by_group(codes.float(), scale).sub_(zero[:, :, None].float())
        return runs.mul_(scale[:, :, None].float()).flatten(1)

    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [out, in] uint8, scales [out, G] float16 and zeros [out, G] uint8."""
        runs = _runs(weight, self._group)
        low, high = runs.amin(-1).clamp_(max=0), runs.amax(-1).clamp_(min=0)
        scale = ((high - low) / 15).clamp_(min=_LEAST_SCALE).half()
        zero = (-low / scale.float()).round_().clamp_(0, 15)
        codes = (runs / scale[:, :, None].float()).round_().add_(zero[:, :, None])
        return codes.clamp_(0, 15).to(torch.uint8).flatten(1), scale, zero.to(torch.uint8)


def _only(options: WriterOptions, name: str, *, bits: int, group: int | None = None) -> None:
    """Raise ConfigError for options other than the only ones that a format has."""
    if options.bits not in (None, bits):
        raise ConfigError(f"--bits must be {bits} in {name}, not {options.bits}: leave it out")
    if options.group_size not in (None, group):
        raise ConfigError(f"{name} has no --group-size of {options.group_size}: leave it out")


def _group(options: WriterOptions) -> int | None:
    """Inputs that share a scale; None is all of them."""
    group = DEFAULT_GROUP if options.group_size is None else options.group_size
    if group == -1:
        return None
    if group < 16 or group % 16:
        raise ConfigError(f"--group-size must be -1 or a multiple of 16, not {group}")
    return group


def _check(name: str, rows: int, columns: int, group: int | None, per_word: int) -> None:
    if group is not None and columns % group:
        fits = math.gcd(columns, group)
        remedy = f"--group-size {fits}" if fits >= 16 and not fits % 16 else "--group-size -1"
        raise ConfigError(
            f"{name!r} has {columns} inputs, which are no whole number of groups of {group}: "
            f"take {remedy}"
        )
    if rows % per_word or columns % per_word:
        raise ConfigError(
            f"{name!r} has {rows} outputs and {columns} inputs; the format packs {per_word} of "
            "each into a word. Take fp8 or int8, which have no such words."
        )


def _compressed(form: str, kind: str, kept: Sequence[str]) -> Mapping[str, Any]:
    numbers = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(kept),
        "kv_cache_scheme": None,
    }


def _scale_of_rows(weight: Tensor, largest: float) -> Tensor:
    """[out, 1] float32."""
    return (weight.abs().amax(1, keepdim=True) / largest).clamp_(min=_LEAST_WIDE)


def _scale_of_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A scale for each block, and the same for each number: [out, in]."""
    rows, columns = weight.shape
    size = GROUP_COLUMNS
    tall, wide = -(-rows // size), -(-columns // size)
    padded = weight.new_zeros(tall * size, wide * size)
    padded[:rows, :columns] = weight.abs()
    scale = padded.view(tall, size, wide, size).amax((1, 3)).div_(LARGEST).clamp_(min=_LEAST_WIDE)
    each = scale.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :columns]
    return scale, each


def _float8(values: Tensor) -> Tensor:
    return values.clamp_(-LARGEST, LARGEST).to(FLOAT8)


def _runs(weight: Tensor, group: int | None) -> Tensor:
    """[out, in] as [out, G, in / G]."""
    rows, columns = weight.shape
    return weight.reshape(rows, -1, group or columns)


def _by_group(values: Tensor, scale: Tensor) -> Tensor:
    """[out, in] as [out, G, in / G], by scales [out, G]."""
    return values.view(*scale.shape, -1)


def _by_word(values: Tensor) -> Tensor:
    """[out, n] as [n, out], the outputs of each word in the order that AWQ has."""
    return values.t().reshape(values.shape[1], -1, 8)[:, :, list(ORDER)].flatten(1)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, m] uint8 as int32 [n, m * bits / 32], the first in the lowest bits."""
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)
