"""What our formats promise of error and size, for the quantizer kit.

Bounds of errors are what the kit's random normal matrices lose, and a tenth more, since a processor
may sum in another order. Bounds of sizes are those of its small matrices.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pagedcore.testing.quantizer_case import (
    EXPERT_LAYERS,
    LAYERS,
    QuantizerCase,
    StackedCase,
)
from pagedcore.testing.written_blocks import gguf_matrix, mxfp4_matrices
from pagedcore.testing.written_formats import WRITTEN

GGUF_BOUNDS = {
    "Q4_0": (0.07, 0.57),
    "Q4_1": (0.067, 0.69),
    "Q5_0": (0.037, 1.07),
    "Q5_1": (0.033, 1.19),
    "Q8_0": (0.0055, 1.07),
    "Q4_K": (0.069, 0.76),
    "Q5_K": (0.033, 1.26),
    "Q6_K": (0.016, 1.26),
}
"""Error and bytes for each weight: 5 and 6 bits are kept in 8, and the scales of K types in 32."""

WIDE = 2.0
"""Bytes of a weight in 16 bits, as experts are whose inputs are reordered."""

SHAPE = ["weight_shape"]
"""Which says nothing that the other tensors' shapes do not."""

GPTQ_ORDER = ["g_idx"]
"""Which says nothing where inputs keep their order."""


def _written(name: str, max_error: float, max_bytes: float, **more: Any) -> QuantizerCase:
    """A format as the tests' writers make it."""
    form = WRITTEN[name]
    return QuantizerCase(
        settings=form.config,
        max_error=max_error,
        max_bytes=max_bytes,
        max_expert_bytes=WIDE if "reordered" in name else max_bytes,
        store=lambda matrix: form.write(matrix)[0],
        stands_for=lambda matrix: form.write(matrix)[1],
        **more,
    )


def _gguf(kind: str, **more: Any) -> QuantizerCase:
    """All layers in blocks of one type."""
    max_error, max_bytes = GGUF_BOUNDS[kind]

    def store(matrix: Tensor) -> Mapping[str, Tensor]:
        return {"weight": gguf_matrix(kind, matrix)[0]}

    return QuantizerCase(
        settings={"quant_method": "gguf", "types": dict.fromkeys((*LAYERS, *EXPERT_LAYERS), kind)},
        max_error=max_error,
        max_bytes=max_bytes,
        max_expert_bytes=max_bytes,
        store=store,
        stands_for=lambda matrix: gguf_matrix(kind, matrix)[1],
        **more,
    )


CASES = {
    "fp8": QuantizerCase(
        settings={},
        max_error=0.023,
        max_bytes=1.1,
        max_expert_bytes=1.1,
        lies=[{"quant_method": "fp8", "activation_scheme": "guessed"}],
        variants={
            "by matrix": _written("fp8 by matrix", 0.025, 1.1, optional=["input_scale"]),
            "blocks": _written("fp8 blocks", 0.024, 1.1),
        },
    ),
    "fbgemm_fp8": QuantizerCase(
        settings={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        max_error=0.023,
        max_bytes=1.1,
        max_expert_bytes=1.1,
        store=lambda matrix: WRITTEN["fp8 by output"].write(matrix)[0],
        stands_for=lambda matrix: WRITTEN["fp8 by output"].write(matrix)[1],
        lies=[{"quant_method": "fp8"}],
    ),
    "compressed-tensors": _written(
        "compressed 4",
        0.085,
        0.57,
        optional=SHAPE,
        lies=[{"quant_method": "compressed-tensors", "config_groups": {}}],
        variants={
            "with zeros": _written("compressed 4 with zeros", 0.067, 0.6, optional=SHAPE),
            "reordered": _written("compressed 4 reordered", 0.083, 0.63, optional=SHAPE),
            "8 bits": _written("compressed 8", 0.0065, 1.02, optional=SHAPE),
            "floats": _written("fp8 by output", 0.023, 1.1),
            "whole numbers": _written("int8 weights", 0.0065, 1.02),
            "whole numbers with zeros": _written("int8 weights with zeros", 0.0062, 1.02),
            "whole numbers on both sides": _written("int8 w8a8", 0.0085, 1.02, rounds_inputs=True),
        },
    ),
    "awq": _written("awq", 0.067, 0.6, lies=[{"quant_method": "awq", "bits": 3}]),
    "gptq": _written(
        "gptq 4",
        0.085,
        0.57,
        optional=GPTQ_ORDER,
        lies=[{"quant_method": "gptq", "bits": 5, "group_size": 32}],
        variants={
            "with zeros": _written("gptq 4 with zeros", 0.067, 0.6, optional=GPTQ_ORDER),
            "reordered": _written("gptq 4 reordered", 0.067, 0.66),
            "by output": _written("gptq 4 by output", 0.105, 0.52, optional=GPTQ_ORDER),
            "8 bits": _written("gptq 8", 0.0055, 1.07, optional=GPTQ_ORDER),
            "8 bits, reordered": _written("gptq 8 reordered", 0.0052, 1.17),
        },
    ),
    "bitsandbytes": _written(
        "bitsandbytes nf4",
        0.078,
        0.57,
        optional=["weight.quant_state.bitsandbytes__nf4"],
        lies=[{"quant_method": "bitsandbytes"}],
        variants={
            "nested": _written("bitsandbytes nf4 nested", 0.078, 0.57),
            "8 bits": _written("bitsandbytes int8", 0.0066, 1.03, optional=["weight_format"]),
        },
    ),
    "gguf": _gguf(
        "Q4_0",
        lies=[{"quant_method": "gguf"}, {"quant_method": "gguf", "types": {LAYERS[0]: "Q9_Z"}}],
        variants={kind: _gguf(kind) for kind in GGUF_BOUNDS if kind != "Q4_0"},
    ),
    "mxfp4": QuantizerCase(  # its linear layers are in 16 bits
        settings={"quant_method": "mxfp4"},
        max_error=0.003,
        max_bytes=WIDE,
        max_expert_bytes=WIDE,
        stands_for=lambda matrix: matrix,
        stacked=StackedCase(
            store=lambda matrices: mxfp4_matrices(matrices)[0],
            stands_for=lambda matrices: mxfp4_matrices(matrices)[1],
            max_error=0.13,
            max_bytes=0.54,
        ),
        lies=[{}, {"quant_method": "gptq"}],
    ),
}
