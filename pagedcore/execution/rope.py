"""Rotary angles, by the name of their scaling in config.json.

    P positions   D rotated elements of a head

A config says `rope_theta` and `rope_scaling`, or, since transformers 5, both in `rope_parameters`.
All scalings but `dynamic` are one frequency for each of D / 2 pairs.

`longrope` has two lists of factors, for texts up to the length that a model was first trained for,
and for longer ones. Keys in a cache cannot turn anew when their sequence grows, and are shared with
others: so the table's length decides for all, and a server for short texts sets `max_model_len`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.ops import RopeTable

TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su")
"""`su` is an old name of `longrope`."""

MAX_POSITIONS = 2**24
"""Beyond, float32 cannot tell one position from the next."""

MAX_HEAD_DIM = 2**16
"""Elements of a head: more is a lie, whose table would take all memory."""


def make_rope(
    config: Mapping[str, Any],
    *,
    head_dim: int,
    max_positions: int,
    device: torch.device,
    theta: float = 10000.0,
) -> RopeTable:
    """The table of a model; `theta` is what holds where config.json has no `rope_theta`.

    Raises ModelError, naming the field, for a scaling that is unknown or not complete.
    """
    model = ConfigFields(config)
    scaling = model.section("rope_parameters") or model.section("rope_scaling")
    scaling = scaling or ConfigFields({}, "rope_scaling.")
    theta = scaling.number("rope_theta", model.number("rope_theta", theta))
    if theta <= 1:
        raise model.error("rope_theta", "must be more than 1")
    part = scaling.number("partial_rotary_factor", model.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * part)
    if head_dim > MAX_HEAD_DIM:
        raise model.error("head_dim", f"must be at most {MAX_HEAD_DIM}, not {head_dim}")
    if dim % 2 or not 0 < dim <= head_dim:
        raise model.error("partial_rotary_factor", f"must give an even part of {head_dim} elements")
    if max_positions > MAX_POSITIONS:
        raise model.error(
            "max_position_embeddings", f"must be at most {MAX_POSITIONS}, or max_model_len be set"
        )
    if device.type == "meta":
        # Check the settings without a position. Operations on meta would load torch's compiler.
        _cos_sin(torch.empty(0), model, scaling, theta, dim, max_positions)
        return RopeTable(torch.empty(max_positions, dim, device=device))
    positions = torch.arange(max_positions, dtype=torch.float32, device=device)
    return RopeTable(_cos_sin(positions, model, scaling, theta, dim, max_positions))


def _cos_sin(
    positions: Tensor,
    model: ConfigFields,
    scaling: ConfigFields,
    theta: float,
    dim: int,
    max_positions: int,
) -> Tensor:
    """Cosines and sines [P, D] for positions [P] float32."""
    kind = scaling.choice("rope_type" if scaling.has("rope_type") else "type", TYPES, "default")
    amplitude = 1.0
    if kind == "dynamic":
        trained = model.size("max_position_embeddings")
        angles = _dynamic_angles(positions, theta, dim, scaling.number("factor"), trained)
    else:
        frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if kind == "linear":
            frequencies /= scaling.number("factor")
        elif kind == "llama3":
            frequencies = _llama3(frequencies, scaling, _trained_length(model, scaling))
        elif kind == "yarn":
            trained = _trained_length(model, scaling)
            factor = scaling.number("factor", model.size("max_position_embeddings") / trained)
            frequencies = _yarn(frequencies, scaling, theta, factor, trained)
            amplitude = _yarn_amplitude(scaling, factor)
        elif kind in ("longrope", "su"):
            trained = _trained_length(model, scaling)
            factor = scaling.number("factor", model.size("max_position_embeddings") / trained)
            frequencies = _longrope(frequencies, scaling, is_long=max_positions > trained)
            amplitude = _longrope_amplitude(scaling, factor, trained)
        angles = torch.outer(positions, frequencies.to(positions.device))
    cos_sin = torch.cat([angles.cos(), angles.sin_()], 1)
    return cos_sin if amplitude == 1.0 else cos_sin.mul_(amplitude)


def _trained_length(model: ConfigFields, scaling: ConfigFields) -> int:
    """Positions before the scaling."""
    name = "original_max_position_embeddings"
    if model.has(name):
        return model.size(name)
    return scaling.size(name, model.size("max_position_embeddings"))


def _dynamic_angles(
    positions: Tensor, theta: float, dim: int, factor: float, trained: int
) -> Tensor:
    """Angles [P, D / 2] whose base grows with the sequence, once it is longer than trained for.

    A token turns by the base of a sequence that ends with it: what transformers does in decoding.
    No token can turn anew when the sequence grows, because its keys are cached, and shared.
    """
    length = (positions + 1).clamp(min=trained)
    grown = (factor * length / trained - (factor - 1)) ** (dim / max(dim - 2, 1))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    return positions[:, None] / (theta * grown)[:, None] ** exponents


def _llama3(frequencies: Tensor, scaling: ConfigFields, trained: int) -> Tensor:
    """Slow pairs turn `factor` times slower, fast ones as before, and between them a mixture."""
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        raise scaling.error("high_freq_factor", f"must be more than low_freq_factor, {low}")
    turns = trained * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def _yarn(
    frequencies: Tensor, scaling: ConfigFields, theta: float, factor: float, trained: int
) -> Tensor:
    """As `_llama3`, with bounds by how often a pair turns within the trained length."""
    dim = 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(scaling.number("beta_fast", 32))
    high = pair_that_turns(scaling.number("beta_slow", 1))
    if scaling.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32)
    slowed = ((pairs - low) / (high - low)).clamp(0, 1)
    return slowed * frequencies / factor + (1 - slowed) * frequencies


def _yarn_amplitude(scaling: ConfigFields, factor: float) -> float:
    """What cosines and sines are multiplied with, so that scores keep their temperature."""

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.has("attention_factor"):
        return scaling.number("attention_factor")
    if scaling.values.get("mscale") and scaling.values.get("mscale_all_dim"):
        return grown(scaling.number("mscale")) / grown(scaling.number("mscale_all_dim"))
    return grown(1.0)


def _longrope(frequencies: Tensor, scaling: ConfigFields, *, is_long: bool) -> Tensor:
    """Every pair turns slower by a factor of its own."""
    short, long = (scaling.numbers(f"{n}_factor", len(frequencies)) for n in ("short", "long"))
    return frequencies / torch.tensor(long if is_long else short)


def _longrope_amplitude(scaling: ConfigFields, factor: float, trained: int) -> float:
    """As `_yarn_amplitude`."""
    if scaling.has("attention_factor"):
        return scaling.number("attention_factor")
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 < trained else 1.0
