"""Writes matrices in the formats that quantized checkpoints have, by rounding to the nearest.

    G groups of inputs that share a scale

Each writer follows its format's definition with plain loops and float32 numbers, and nothing of
what reads it, so that one can be tested against the other.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor]
"""Tensors by what follows the layer's name, and the matrix [out, in] float32 they stand for."""


@dataclass(frozen=True, slots=True)
class WrittenFormat:
    """One way to store matrices."""

    config: Mapping[str, Any]
    """The quantization_config."""

    write: Callable[[Tensor], Written]
    """Stores a matrix [out, in] float32."""

    error: float
    """No number is off by more than this share of the largest of the matrix."""


def affine(weight: Tensor, bits: int, group: int, *, symmetric: bool) -> tuple[Tensor, ...]:
    """Codes [out, in], scales and zeros [out, G], and the matrix that they stand for.

    Scales have 16 bits, as in most checkpoints.
    """
    rows, columns = weight.shape
    runs = weight.float().view(rows, columns // group, group)
    largest = 2**bits - 1
    if symmetric:
        scale = runs.abs().amax(-1) / (largest // 2)
        zero = torch.full_like(scale, largest // 2 + 1)
    else:
        low, high = runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)
        scale = (high - low) / largest
        zero = (-low / scale.clamp(min=1e-9)).round()
    scale = scale.clamp(min=1e-4).half().float()
    codes = (runs / scale[:, :, None]).round() + zero[:, :, None]
    codes = codes.clamp(0, largest)
    stood_for = (codes - zero[:, :, None]) * scale[:, :, None]
    return codes.view(rows, columns).int(), scale, zero.int(), stood_for.view(rows, columns)


def words(codes: Tensor, bits: int, places: list[int] | None = None) -> Tensor:
    """Codes [n, m] as int32 [n, m * bits / 32]; place k of a word holds its places[k]-th code."""
    per_word = 32 // bits
    places = places or list(range(per_word))
    packed = torch.zeros(len(codes), codes.shape[1] // per_word, dtype=torch.int64)
    for k, code in enumerate(places):
        packed |= codes[:, code::per_word].long() << (bits * k)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def gptq(bits: int, group: int, *, symmetric: bool, version: int, reorders: bool) -> WrittenFormat:
    """GPTQ, of which version 1 stores zeros less one; `reorders` deals inputs out to groups."""

    def write(weight: Tensor) -> Written:
        columns = weight.shape[1]
        size = group if group > 0 else columns
        index = torch.arange(columns) // size
        if reorders:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        order = index.argsort(stable=True)
        codes, scale, zero, stood_for = affine(weight[:, order], bits, size, symmetric=symmetric)
        back = order.argsort()
        stored = (zero - 1) % 2**bits if version == 1 else zero
        tensors = {
            "qweight": words(codes[:, back], bits).t().contiguous(),
            "qzeros": words(stored.t(), bits),
            "scales": scale.t().half().contiguous(),
            "g_idx": index.int(),
        }
        return tensors, stood_for[:, back]

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": reorders,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return WrittenFormat(config, write, _half_step(bits, symmetric))


def awq(group: int) -> WrittenFormat:
    """AWQ in the layout `gemm`."""
    places = [0, 2, 4, 6, 1, 3, 5, 7]

    def write(weight: Tensor) -> Written:
        codes, scale, zero, stood_for = affine(weight, 4, group, symmetric=False)
        tensors = {
            "qweight": words(codes.t(), 4, places),
            "qzeros": words(zero.t(), 4, places),
            "scales": scale.t().half().contiguous(),
        }
        return tensors, stood_for

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    }
    return WrittenFormat(config, write, _half_step(4, symmetric=False))


def packed_words(
    bits: int, group: int | None, *, symmetric: bool, reorders: bool = False
) -> WrittenFormat:
    """compressed-tensors, pack-quantized; `group` None is one scale for each output."""

    def write(weight: Tensor) -> Written:
        rows, columns = weight.shape
        size = group or columns
        index = torch.arange(columns) // size
        if reorders:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(2))]
        order = index.argsort(stable=True)
        codes, scale, zero, stood_for = affine(weight[:, order], bits, size, symmetric=symmetric)
        back = order.argsort()
        tensors = {
            "weight_packed": words(codes[:, back], bits),
            "weight_scale": scale.half(),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(zero.t(), bits).t().contiguous()
        if reorders:
            tensors["weight_g_idx"] = index.int()
        return tensors, stood_for[:, back]

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "actorder": "group" if reorders else None,
    }
    return WrittenFormat(_compressed("pack-quantized", weights), write, _half_step(bits, symmetric))


def whole_numbers(*, symmetric: bool = True, rounds_rows: bool = False) -> WrittenFormat:
    """compressed-tensors, int-quantized: one scale for each output."""

    def write(weight: Tensor) -> Written:
        codes, scale, zero, stood_for = affine(weight, 8, weight.shape[1], symmetric=symmetric)
        tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scale.half()}
        if not symmetric:
            tensors["weight_zero_point"] = (zero - 128).to(torch.int8)
        return tensors, stood_for

    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    rows = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    config = _compressed("int-quantized", weights, rows if rounds_rows else None)
    return WrittenFormat(config, write, _half_step(8, symmetric))


def float_blocks() -> WrittenFormat:
    """fp8 with a scale for each block of 128 by 128, as DeepSeek stores it."""

    def write(weight: Tensor) -> Written:
        rows, columns = weight.shape
        scale = torch.empty(-(-rows // 128), -(-columns // 128))
        each = torch.empty(rows, columns)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                span = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                scale[i, j] = weight[span].abs().max().float() / 448
                each[span] = scale[i, j]
        values = (weight / each).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale_inv": scale}, values.float() * each

    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return WrittenFormat(config, write, 16 / 448 + 1e-6)


def float_matrices() -> WrittenFormat:
    """fp8 with one scale for a matrix, and one for its inputs, which were measured."""

    def write(weight: Tensor) -> Written:
        scale = weight.abs().max().float() / 448
        values = (weight / scale).to(torch.float8_e4m3fn)
        tensors = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(0.1)}
        return tensors, values.float() * scale

    config = {"quant_method": "fp8", "activation_scheme": "static"}
    return WrittenFormat(config, write, 16 / 448 + 1e-6)


def float_rows() -> WrittenFormat:
    """compressed-tensors, float-quantized: one scale for each output."""

    def write(weight: Tensor) -> Written:
        scale = weight.abs().amax(1, keepdim=True).float() / 448
        values = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": scale}, values.float() * scale

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    rows = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    return WrittenFormat(_compressed("float-quantized", weights, rows), write, 16 / 448 + 1e-6)


def bitsandbytes_4(*, nested: bool) -> WrittenFormat:
    """bitsandbytes' NF4, whose scales may be in 8 bits themselves."""
    table = normal_table()

    def write(weight: Tensor) -> Written:
        runs = weight.float().reshape(-1, 64)
        largest = runs.abs().amax(1)
        tensors = {"weight.quant_map": table.clone()}
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32"}
        state |= {"shape": list(weight.shape)}
        if nested:
            map_ = torch.linspace(-1, 1, 256)
            offset = float(largest.mean())
            spans = (largest - offset).split(256)
            nested_largest = torch.stack([span.abs().max() for span in spans])
            each = nested_largest.repeat_interleave(256)[: len(largest)]
            codes = ((largest - offset) / each.clamp(min=1e-9) * 127.5 + 127.5).round()
            tensors["weight.absmax"] = codes.to(torch.uint8)
            tensors["weight.nested_absmax"] = nested_largest
            tensors["weight.nested_quant_map"] = map_
            state |= {"nested_blocksize": 256, "nested_offset": offset}
            state |= {"nested_dtype": "float32"}
            largest = map_[codes.int()] * each + offset
        else:
            tensors["weight.absmax"] = largest
        codes = (runs / largest[:, None]).unsqueeze(-1).sub(table).abs().argmin(-1)
        flat = codes.view(-1).to(torch.uint8)
        tensors["weight"] = (flat[::2] << 4 | flat[1::2])[:, None]
        text = json.dumps(state).encode()
        tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text)).byte()
        return tensors, (table[codes] * largest[:, None]).view(weight.shape)

    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
    }
    return WrittenFormat(config, write, 0.16)


def bitsandbytes_8() -> WrittenFormat:
    """bitsandbytes' INT8: the largest number of each output is stored."""

    def write(weight: Tensor) -> Written:
        largest = weight.float().abs().amax(1)
        values = (weight / largest[:, None] * 127).round().to(torch.int8)
        tensors = {"weight": values, "SCB": largest, "weight_format": torch.tensor(0).byte()}
        return tensors, values.float() * (largest / 127)[:, None]

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return WrittenFormat(config, write, 0.5 / 127 + 1e-6)


def normal_table() -> Tensor:
    """NF4's numbers: quantiles of a normal distribution, zero among them, up to 1."""
    tail = 0.9677083
    above = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    table = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (table / table.max()).float()


def _compressed(
    form: str, weights: dict[str, Any], rows: dict[str, Any] | None = None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": rows, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _half_step(bits: int, symmetric: bool) -> float:
    """Half the distance of codes, and some for scales and zeros that were rounded."""
    return (0.55 if symmetric else 1.15) / float((1 << (bits - 1)) - 1)


WRITTEN: Mapping[str, WrittenFormat] = {
    "fp8 by matrix": float_matrices(),
    "fp8 by output": float_rows(),
    "fp8 blocks": float_blocks(),
    "int8 w8a8": whole_numbers(rounds_rows=True),
    "int8 weights": whole_numbers(),
    "int8 weights with zeros": whole_numbers(symmetric=False),
    "awq": awq(32),
    "gptq 4": gptq(4, 32, symmetric=True, version=1, reorders=False),
    "gptq 4 with zeros": gptq(4, 32, symmetric=False, version=1, reorders=False),
    "gptq 4 reordered": gptq(4, 32, symmetric=False, version=2, reorders=True),
    "gptq 4 by output": gptq(4, -1, symmetric=True, version=2, reorders=False),
    "gptq 8": gptq(8, 32, symmetric=True, version=1, reorders=False),
    "gptq 8 reordered": gptq(8, 32, symmetric=False, version=1, reorders=True),
    "compressed 4": packed_words(4, 32, symmetric=True),
    "compressed 4 with zeros": packed_words(4, 32, symmetric=False),
    "compressed 4 reordered": packed_words(4, 32, symmetric=True, reorders=True),
    "compressed 8": packed_words(8, None, symmetric=True),
    "bitsandbytes nf4": bitsandbytes_4(nested=False),
    "bitsandbytes nf4 nested": bitsandbytes_4(nested=True),
    "bitsandbytes int8": bitsandbytes_8(),
}
"""By a name for tables and tests."""
