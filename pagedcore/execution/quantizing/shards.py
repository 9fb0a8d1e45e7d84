"""The files of a checkpoint that is being written: each is there whole, or not at all.

A file gets its name when all of it is on the disk, so that one with a name need not be written
again by whoever goes on after an interruption.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.checkpoint import INDEX, SINGLE
from pagedcore.execution.safetensors_file import StoredTensor, read_header


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, and the tensors of the original that it holds in some form."""

    file: str
    names: tuple[str, ...]


def plan_shards(stored: Mapping[str, StoredTensor], max_bytes: int) -> list[Shard]:
    """Files for at most `max_bytes` of the original each, or one tensor, in its order."""
    runs: list[list[str]] = [[]]
    size = 0
    for name, tensor in stored.items():
        if runs[-1] and size + tensor.num_bytes > max_bytes:
            runs.append([])
            size = 0
        runs[-1].append(name)
        size += tensor.num_bytes
    if len(runs) == 1:
        return [Shard(SINGLE, tuple(runs[0]))]
    return [
        Shard(f"model-{number:05}-of-{len(runs):05}.safetensors", tuple(run))
        for number, run in enumerate(runs, 1)
    ]


def is_whole(path: Path) -> bool:
    """Whether a file is there that can be read to its end."""
    try:
        return path.is_file() and bool(read_header(path))
    except ModelError:
        return False


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    part = _part(path)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        part,
        metadata={"format": "pt"},
    )
    _name(part, path)


def write_index(folder: Path, shards: Iterable[Shard]) -> None:
    """Write which file holds what, by what the files say; nothing for a single one."""
    files = [shard.file for shard in shards]
    if files == [SINGLE]:
        return
    headers = {file: read_header(folder / file) for file in files}
    places = {name: file for file, header in headers.items() for name in header}
    total = sum(tensor.num_bytes for header in headers.values() for tensor in header.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / INDEX, index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object."""
    part = _part(path)
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _name(part, path)


def copy_files(source: Path, target: Path, suffixes: Sequence[str]) -> None:
    """Copy what is beside the weights, such as the tokenizer's files; not config.json."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if is_hidden or path.suffix not in suffixes or not path.is_file():
            continue
        if str(relative) == "config.json" or path.name.endswith(".index.json"):
            continue
        place = target / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        part = _part(place)
        part.write_bytes(path.read_bytes())
        _name(part, place)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _name(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
