"""Write a GGUF file of the Llama family as a model folder in Hugging Face's layout.

Weights become bfloat16, a few million values at a time, so memory does not grow with the model; or
those of layers and of the head keep their blocks, as bytes, and config.json says of which type.
The safetensors format is specified at https://github.com/huggingface/safetensors#format.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pagedcore.sources.cache import ensure_space
from pagedcore.sources.gguf_config import (
    ROPE_FACTORS,
    Architecture,
    Metadata,
    architecture_of,
    generation_config,
    model_config,
)
from pagedcore.sources.gguf_reader import GgufFile, GgufTensor
from pagedcore.sources.gguf_tokenizer import write_tokenizer
from pagedcore.sources.progress import Report

CHUNK_VALUES = 1 << 22
"""Values that are in memory at a time, as float32."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor under its new name, with its rows in their new order."""

    name: str
    tensor: GgufTensor
    rows: npt.NDArray[np.int64] | None = None
    is_packed: bool = False

    @property
    def num_bytes(self) -> int:
        return self.tensor.num_rows * (
            self.tensor.row_bytes if self.is_packed else 2 * self.tensor.shape[-1]
        )

    @property
    def header(self) -> dict[str, Any]:
        if self.is_packed:
            return {"dtype": "U8", "shape": (self.tensor.num_rows, self.tensor.row_bytes)}
        return {"dtype": "BF16", "shape": self.tensor.shape}


def convert(path: Path, folder: Path, report: Report, *, packed: bool = False) -> None:
    """Write the model of the GGUF file at `path` into the existing `folder`.

    With `packed`, weights of layers and of the head that are in blocks stay so.

    `report` is told how many bytes of weights are written, and of how many. Raises ModelError for a
    file that is broken, or of an architecture, tensor type or tokenizer that is not read, and
    OSError where the folder cannot hold it.
    """
    file = GgufFile.open(path)
    config = model_config(file)
    weights = _weights(file, config)
    if packed:
        weights = _packed(weights)
        config["quantization_config"] = {
            "quant_method": "gguf",
            "types": {
                weight.name.removesuffix(".weight"): weight.tensor.type.name
                for weight in weights
                if weight.is_packed
            },
        }
    write_tokenizer(file, folder)
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation_config(file)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    ensure_space(folder, sum(weight.num_bytes for weight in weights))
    with (folder / "model.safetensors").open("wb") as out:
        _write_weights(out, file, weights, report)


def _weights(file: GgufFile, config: Mapping[str, Any]) -> list[_Weight]:
    """Every tensor that the architecture has, checked for its name and shape."""
    metadata = Metadata(file)
    architecture = architecture_of(file)
    if config["num_hidden_layers"] > len(file.tensors):  # before anything is made per layer
        raise metadata.error(
            f"has {config['num_hidden_layers']} layers and only {len(file.tensors)} tensors"
        )
    expected = _expected(architecture, config)
    missing = sorted(expected.keys() - file.tensors.keys())
    unknown = sorted(file.tensors.keys() - expected.keys() - {ROPE_FACTORS})
    if missing or unknown:
        found = f"lacks the tensor {missing[0]!r}" if missing else f"has a tensor {unknown[0]!r}"
        raise metadata.error(f"{found}, and so is no {architecture.class_name}")
    weights = []
    for stored, (name, shape) in expected.items():
        tensor = file.tensors[stored]
        if tensor.shape != shape:
            raise metadata.error(f"has {stored!r} of shape {tensor.shape}, not {shape}")
        rows = None
        if architecture.permuted and stored.endswith(("attn_q.weight", "attn_k.weight")):
            rows = _halves_apart(shape[0], config["head_dim"])
        weights.append(_Weight(name, tensor, rows))
    return weights


def _packed(weights: list[_Weight]) -> list[_Weight]:
    """The same, with the matrices of layers and the head in their blocks.

    An embedding is widened, since its rows are looked up, and where it is the head too, its blocks
    are kept besides.
    """
    if all(weight.name != _HEAD for weight in weights):
        embedding = next(weight for weight in weights if weight.name == _EMBEDDING)
        if embedding.tensor.type.block_size > 1:
            weights = [*weights, replace(embedding, name=_HEAD)]
    return [replace(weight, is_packed=_is_packable(weight)) for weight in weights]


def _is_packable(weight: _Weight) -> bool:
    """Whether it is a layer's matrix or the head, in blocks."""
    is_matrix = weight.name.endswith("_proj.weight") or weight.name == _HEAD
    return is_matrix and weight.tensor.type.block_size > 1


def _expected(
    architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """New name and shape of each tensor, by its name in the file."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "attn_q.weight": (queries, hidden),
        "attn_k.weight": (keys, hidden),
        "attn_v.weight": (keys, hidden),
        "attn_output.weight": (hidden, queries),
        "attn_q.bias": (queries,),
        "attn_k.bias": (keys,),
        "attn_v.bias": (keys,),
        "attn_q_norm.weight": (config["head_dim"],),
        "attn_k_norm.weight": (config["head_dim"],),
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }
    vocabulary = (config["vocab_size"], hidden)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": (_EMBEDDING, vocabulary)
    }
    for layer in range(config["num_hidden_layers"]):
        for stored, name in architecture.layer_tensors.items():
            expected[f"blk.{layer}.{stored}"] = (f"model.layers.{layer}.{name}", shapes[stored])
    expected["output_norm.weight"] = ("model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        expected["output.weight"] = (_HEAD, vocabulary)
    return expected


def _halves_apart(num_rows: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Which stored row comes where: the pairs that rope turns are neighbours in the file.

    transformers has the first of each pair in the first half of its head, the second in the other.
    """
    rows = np.arange(num_rows).reshape(-1, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _write_weights(out: BinaryIO, file: GgufFile, weights: list[_Weight], report: Report) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for weight in weights:
        offsets = [total, total + weight.num_bytes]
        header[weight.name] = weight.header | {"data_offsets": offsets}
        total = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    out.write(struct.pack("<Q", len(text)) + text)
    done = 0
    for weight in weights:
        for values in _chunks(file, weight):
            out.write(values.tobytes())
            done += values.nbytes
            report(done, total)


def _chunks(file: GgufFile, weight: _Weight) -> Iterator[npt.NDArray[Any]]:
    """What is written of a weight, as bfloat16 or as it is, a run of rows at a time."""
    stored = file.rows(weight.tensor)
    step = max(CHUNK_VALUES // weight.tensor.shape[-1], 1)
    for start in range(0, len(stored), step):
        rows = slice(start, start + step)
        picked = stored[rows] if weight.rows is None else stored[weight.rows[rows]]
        if weight.is_packed:
            yield picked
        else:
            yield _bfloat16(weight.tensor.type.dequantize(picked))


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The nearest bfloat16, of two as near the even one; as its bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    # Rounding up would carry a NaN over into the sign.
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)
