"""A model folder as `Weights`: config.json and safetensors, checked before anything is read.

A start looks at a checkpoint twice. `shapes` gives tensors on the device "meta": the model that is
built of them shows which tensors it wants, and `check_all_taken` which are missing or left over.
`tensors` then reads, in the order that was learned.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from pagedcore.errors import ModelError
from pagedcore.execution.safetensors_file import StoredTensor, read_header
from pagedcore.execution.shard import Share, cut
from pagedcore.execution.weight_reader import WeightReader, join_parts, parts_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 << 20

FLOATS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Types that stand for each other: a model may run in another than it was stored in."""

_MOST_NAMED = 8  # names in one message


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class Checkpoint:
    """The files of a model folder: its configuration, and which tensors there are."""

    def __init__(self, folder: Path) -> None:
        """Read config.json and all headers. Raises ModelError for what is missing or broken."""
        self.folder = folder
        self.config: Mapping[str, Any] = read_config(folder)
        self.stored: Mapping[str, StoredTensor] = find_tensors(folder)
        self._wanted: dict[str, list[StoredTensor]] = {}
        self._missing: list[str] = []
        self._ignored: set[str] = set()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(tensor.num_bytes for tensor in self.stored.values())

    @property
    def dtype(self) -> torch.dtype:
        """The model's float type: what config.json says, or else what most bytes are stored in."""
        stated = config_dtype(self.config)
        if stated is not None:
            return stated
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.stored.values():
            sizes[tensor.dtype] += tensor.num_bytes
        floats = [dtype for dtype, _ in sizes.most_common() if dtype in FLOATS.values()]
        if not floats:
            raise ModelError(f"{self.folder} holds no float tensors. Set dtype in its config.json.")
        return floats[0]

    def shapes(self, dtype: torch.dtype) -> "CheckpointShapes":
        """Weights without content, for a model that computes in `dtype`."""
        self._wanted.clear()
        self._missing.clear()
        self._ignored.clear()
        return CheckpointShapes(
            self.stored, dtype, wanted=self._wanted, missing=self._missing, ignored=self._ignored
        )

    def check_all_taken(self) -> None:
        """Raise ModelError when `shapes` was asked for a tensor that is missing, or left one over.

        A leftover means that the model is another than its config.json says.
        """
        if self._missing:
            raise _lacking(self._missing)
        ignored = tuple(self._ignored)
        left = [n for n in self.stored if n not in self._wanted and not n.startswith(ignored)]
        if left:
            raise ModelError(
                f"the checkpoint has {len(left)} tensors that the model of its config.json does "
                f"not use: {_some(left)}. Its architecture or its sizes are others."
            )

    def tensors(self, dtype: torch.dtype, device: torch.device) -> "CheckpointTensors":
        """Weights for a model that computes in `dtype` on `device`.

        Reading is fastest in the order in which `shapes` was asked. Call `finish` at the end.
        """
        order = [part for parts in self._wanted.values() for part in parts]
        return CheckpointTensors(self.stored, dtype, device, order=order)


class CheckpointShapes:
    """`Weights` on the device "meta"; remembers what it was asked for.

    A missing tensor raises only when there are several, so that all can be named together.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        *,
        wanted: dict[str, list[StoredTensor]],
        missing: list[str],
        ignored: set[str],
    ) -> None:
        self._stored = stored
        self.dtype = dtype
        self._wanted = wanted
        self._missing = missing
        self._ignored = ignored

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """See `Weights.stored_shape`."""
        return self._stored[name].shape if name in self._stored else None

    def has(self, name: str) -> bool:
        """See `Weights.has`."""
        return name in self._stored

    def take(
        self,
        name: str,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        dim: int | None = None,
    ) -> Tensor:
        """See `Weights.take`."""
        dtype = dtype or self.dtype
        if name in self._stored:
            tensor = self._stored[name]
            check_stored(name, tensor, shape, dtype, dim)
            self._wanted[name] = [tensor]
        else:
            self._missing.append(name)
            if len(self._missing) == _MOST_NAMED:
                raise _lacking(self._missing)
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    def take_pieces(
        self,
        name: str,
        shape: Sequence[int],
        dim: int,
        pieces: Sequence[range],
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See `TakesPieces.take_pieces`."""
        whole = self.take(name, shape, dtype=dtype, dim=dim)
        if name in self._stored:
            self._wanted[name] = parts_of(self._stored[name], dim, pieces)
        return cut(whole, dim, pieces)

    def divide(self, layer: str, share: Share | None) -> None:
        """See `Weights.divide`: a single rank has everything."""

    def ignore(self, prefix: str) -> None:
        """See `Weights.ignore`."""
        self._ignored.add(prefix)


class CheckpointTensors:
    """`Weights` with their content, cast to the model's type on the model's device."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        device: torch.device,
        *,
        order: Collection[StoredTensor],
    ) -> None:
        self._stored = stored
        self.dtype = dtype
        self._reader = WeightReader(device, order)
        self._extremes: dict[str, tuple[Tensor, Tensor]] = {}

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """See `Weights.stored_shape`."""
        return self._stored[name].shape if name in self._stored else None

    def has(self, name: str) -> bool:
        """See `Weights.has`."""
        return name in self._stored

    def take(
        self,
        name: str,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        dim: int | None = None,
    ) -> Tensor:
        """See `Weights.take`."""
        stored = self._find(name, shape, dtype, dim)
        return self._watch(name, self._reader.read(stored).to(dtype or self.dtype))

    def take_pieces(
        self,
        name: str,
        shape: Sequence[int],
        dim: int,
        pieces: Sequence[range],
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See `TakesPieces.take_pieces`: only pieces of the first dimension lie together."""
        stored = self._find(name, shape, dtype, dim)
        read = [self._reader.read(part) for part in parts_of(stored, dim, pieces)]
        tensor = cut(read[0], dim, pieces) if dim else join_parts(read)
        return self._watch(name, tensor.to(dtype or self.dtype))

    def _find(
        self, name: str, shape: Sequence[int], dtype: torch.dtype | None, dim: int | None
    ) -> StoredTensor:
        if name not in self._stored:
            raise _lacking([name])
        check_stored(name, self._stored[name], shape, dtype or self.dtype, dim)
        return self._stored[name]

    def _watch(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, whose numbers `finish` looks at."""
        if tensor.dtype in FLOATS.values() and tensor.numel():
            self._extremes[name] = torch.aminmax(tensor)  # one NaN makes both NaN
        return tensor

    def divide(self, layer: str, share: Share | None) -> None:
        """See `Weights.divide`: a single rank has everything."""

    def ignore(self, prefix: str) -> None:
        """See `Weights.ignore`."""

    def finish(self) -> None:
        """Give back what reading needed.

        Raises ModelError for tensors that hold NaN or infinity: they would turn all output into
        noise, and the model into one that never ends.
        """
        self._reader.close()
        if self._extremes:
            names = list(self._extremes)
            flat = [value.float() for pair in self._extremes.values() for value in pair]
            finite = torch.stack(flat).isfinite().view(-1, 2).all(1).tolist()
            self._extremes.clear()
            bad = [name for name, good in zip(names, finite, strict=True) if not good]
            if bad:
                raise ModelError(
                    f"the checkpoint has {len(bad)} tensors that hold NaN or infinity: "
                    f"{_some(bad)}. Fetch the model again, or take another."
                )


def check_stored(
    name: str, stored: StoredTensor, shape: Sequence[int], dtype: torch.dtype, dim: int | None
) -> None:
    """Raise ModelError unless a stored tensor can be taken like this.

    Float types stand for each other; any other type must be the one that is stored, because its
    numbers mean nothing without their format's scales.
    """
    assert dim is None or 0 <= dim < len(shape), f"{name} has no dimension {dim}"
    if stored.shape != tuple(shape):
        raise ModelError(
            f"{name!r} must have the shape {list(shape)} by config.json, and {stored.path.name} "
            f"holds {list(stored.shape)}. The two do not belong together."
        )
    floats = FLOATS.values()
    if stored.dtype != dtype and not (stored.dtype in floats and dtype in floats):
        raise ModelError(
            f"{name!r} must have a type like {dtype}, and {stored.path.name} holds {stored.dtype}. "
            "If the weights are quantized, config.json must have their quantization_config."
        )


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder: of one file, or of the shards that an index names.

    Raises ModelError when there are none, when a file is missing or broken, or when the index names
    a file outside of the folder or a tensor that is not where it says.
    """
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    index = folder / INDEX
    if not index.exists():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        remedy = (
            f"{pickled[0]} is a pickle, which is not read: convert it with transformers' "
            "save_pretrained."
            if pickled
            else "Fetch the model again, or use load_format=dummy for random weights."
        )
        raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}. {remedy}")
    try:
        places = msgspec.json.decode(_read_bounded(index), type=_Index).weight_map
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ModelError(f"{index} is no index of shards: {error}. Fetch it again.") from error
    shards = sorted(set(places.values()))
    for shard in shards:
        if shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {shard!r:.80}, which is no safetensors file beside it."
            )
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards: {_some(missing)}. "
            "Fetch the model again."
        )
    headers = {shard: read_header(folder / shard) for shard in shards}
    lost = [name for name, shard in places.items() if name not in headers[shard]]
    if lost:
        raise ModelError(
            f"{index} looks for {_some(lost)} in {places[lost[0]]}, which does not hold it. "
            "Fetch the model again."
        )
    return {name: headers[shard][name] for name, shard in places.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json. Raises ModelError unless it is one JSON object."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder} has no config.json: it is no model folder.")
    try:
        return msgspec.json.decode(_read_bounded(path), type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} must hold a JSON object: {error}. Fetch it again.") from error


def config_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The float type that a config.json states, if any."""
    for field in ("dtype", "torch_dtype"):
        name = config.get(field)
        if name is not None:
            return float_type(field, name)
    return None


def float_type(field: str, name: object) -> torch.dtype:
    """Torch's type for a name in config.json. Raises ModelError for one that is no float type."""
    plain = name.removeprefix("torch.") if isinstance(name, str) else ""
    if plain not in FLOATS:
        raise ModelError(f"config.json: {field} must be one of {', '.join(FLOATS)}, not {name!r}.")
    return FLOATS[plain]


def _read_bounded(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror or error}. Fetch the model again."
        ) from error
    if len(content) > MAX_JSON_BYTES:
        raise ModelError(f"{path} has more than {MAX_JSON_BYTES} bytes; no model needs that.")
    return content


def _lacking(names: Sequence[str]) -> ModelError:
    return ModelError(
        f"the checkpoint lacks tensors that its config.json asks for: {_some(names)}. "
        "The two do not belong together, or the model is not complete."
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"
