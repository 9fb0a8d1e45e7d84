"""Write a GGUF file of the Llama family as a model folder in Hugging Face's layout.

Weights become bfloat16, a few million values at a time, so memory does not grow with the model.
The safetensors format is specified at https://github.com/huggingface/safetensors#format.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pagedcore.errors import ModelError
from pagedcore.sources.gguf_config import (
    ROPE_FACTORS,
    architecture_of,
    generation_config,
    model_config,
)
from pagedcore.sources.gguf_reader import GgufFile, GgufTensor
from pagedcore.sources.gguf_tokenizer import write_tokenizer

CHUNK_VALUES = 1 << 22
"""Values that are in memory at a time, as float32."""


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor under its new name, with its rows in their new order."""

    name: str
    tensor: GgufTensor
    rows: npt.NDArray[np.int64] | None = None


def convert(path: Path, folder: Path, advance: Callable[[int], object] | None = None) -> None:
    """Write the model of the GGUF file at `path` into the existing `folder`.

    `advance` is told, bit by bit, how many of the file's bytes are done. Raises ModelError for a
    file that is broken, or of an architecture, tensor type or tokenizer that is not read.
    """
    file = GgufFile.open(path)
    config = model_config(file)
    weights = _weights(file, config)
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation_config(file)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(file, folder)
    with (folder / "model.safetensors").open("wb") as out:
        _write_weights(out, file, weights, advance or (lambda count: None))
        out.flush()
        os.fsync(out.fileno())  # the folder is taken for whole from now on, even after a crash


def _weights(file: GgufFile, config: dict[str, object]) -> list[_Weight]:
    """Every tensor that the architecture has, checked for its name and shape."""
    architecture = architecture_of(file)
    expected = dict(_expected(architecture, config))
    missing = sorted(expected.keys() - file.tensors.keys())
    unknown = sorted(file.tensors.keys() - expected.keys() - {ROPE_FACTORS})
