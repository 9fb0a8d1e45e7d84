"""What a model takes, by its config.json alone: weights, cache groups, and the largest step.

    T tokens of a step   S sequences   h hidden size   V vocabulary

The model is built on the device "meta", as a start builds it before it reads a weight, and what it
holds there is counted. No device is needed, and no file but config.json; where headers of
safetensors lie beside it, they are believed over what config.json leaves open.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import pluggy
import torch
from torch import Tensor

from pagedcore.cache_spec import CacheGroup, group_layers
from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError, ModelError
from pagedcore.execution.adapter_store import build_adapted
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.devices import choose_dtype
from pagedcore.execution.expert_ops import Experts, Routing
from pagedcore.execution.headless import complete
from pagedcore.execution.kv_cache import check_format
from pagedcore.execution.kv_formats import KVFormat, choose_kv_format
from pagedcore.execution.layers import Head
from pagedcore.execution.loading import (
    check_asked_length,
    choose_backend,
    choose_quantizer,
    longest_context,
)
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.model_choice import architecture, choose_model
from pagedcore.execution.model_config import complete_config
from pagedcore.execution.ops import Ops
from pagedcore.execution.pooled_model import longest_prompt
from pagedcore.execution.random_weights import RandomCheckpoint
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.plugins import choose, collect

_CPU = torch.device("cpu")
_META = torch.device("meta")
_LEAVES = (str, bytes, int, float, bool, type, ModuleType, BuiltinFunctionType)
_CANDIDATES = 8 * 4096
"""Bytes of the lists in which a draw with filters keeps a row's best tokens."""

_BOOKKEEPING = 32
"""Bytes of a step's lists for each token: its id, position, slots and row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """A model's sizes, whatever memory there is for it."""

    architecture: str
    dtype: torch.dtype
    quantization: str
    """The weight format's name; "none" for weights in the model's type."""

    backend: str
    block_size: int
    """What the backend prefers."""

    own_length: int
    """Longest sequence by config.json."""

    groups: tuple[CacheGroup, ...]
    kv_format: KVFormat
    """In which the cache keeps keys and values."""

    num_layers: int
    vocab_size: int
    weight_bytes: int
    """Of all tensors of the model, with rotary tables and room for adapters."""

    hidden_size: int
    widest_step: int
    """Elements per token that are alive at once inside of a layer, at most."""

    notes: tuple[str, ...] = ()
    """What could not be known, in words."""

    def step_bytes(self, num_tokens: int, num_seqs: int) -> int:
        """Peak of the largest step, beside the weights: an estimate.

        In a layer, T rows hold the stream, what attention added to it, and what goes in and comes
        out of the two products that follow each other and are widest together. At the end, T rows
        of hidden states are still there while S rows of logits are drawn from, in float32.
        """
        size, h = self.dtype.itemsize, self.hidden_size
        layer = num_tokens * (2 * h + self.widest_step) * size
        draw = 0
        if self.groups:
            draw = num_tokens * h * size
            draw += num_seqs * (4 * self.vocab_size + h * size + _CANDIDATES)
        return max(layer, draw) + num_tokens * _BOOKKEEPING


def survey(
    config: EngineConfig, folder: Path, plugins: pluggy.PluginManager, *, on_gpu: bool
) -> Survey:
    """Look at the model of a folder that needs to hold a config.json alone.

    Raises ConfigError, ModelError, PluginError or UnknownNameError, as a start would.
    """
    notes: list[str] = []
    checkpoint = _open(config, folder, notes)
    model_class = choose_model(config.model.model_impl, checkpoint.config, plugins)
    of_model = complete_config(checkpoint.config, model_class)
    quantizer = choose_quantizer(config, of_model, plugins)
    dtype = choose_dtype(config.model.dtype, checkpoint.dtype, _CPU)  # every GPU has bfloat16
    ops = _backend(config, dtype, plugins, notes) if on_gpu else None
    ops = ops or choose_backend(config, _CPU, dtype, plugins)
    kv_format = choose_kv_format(config.cache.kv_cache_dtype, dtype, plugins)
    own_length = longest_context(of_model)
    asked = config.model.max_model_len
    check_asked_length(asked, own_length)
    build = ModelBuild(
        config=of_model,
        weights=checkpoint.shapes(dtype),
        quantizer=quantizer,
        ops=ops,
        dtype=dtype,
        device=_META,
        max_positions=own_length if asked in (None, -1) else asked,
    )
    model = model_class(build)
    checkpoint.check_all_taken()
    groups = group_layers(model.cache_specs)
    check_format(ops, groups, kv_format)
    if config.lora.enable_lora:
        without = replace(config.lora, lora_modules=())  # which have room whether there or not
        model, _ = build_adapted(model_class, build, without, is_decoder=bool(groups))
    if not groups:
        own_length = longest_prompt(model, own_length)
        check_asked_length(asked, own_length)
    parts = list(parts_of(model, skip=(ops, of_model, quantizer)))
    hidden_size = of_model.get("hidden_size", of_model.get("n_embd", 0))
    return Survey(
        architecture=architecture(checkpoint.config),
        dtype=dtype,
        quantization=quantizer.name,
        backend=ops.name,
        block_size=ops.block_size,
        own_length=own_length,
        groups=groups,
        kv_format=kv_format,
        num_layers=len(model.cache_specs),
        vocab_size=model.vocab_size,
        weight_bytes=storage_bytes(part for part in parts if isinstance(part, Tensor))
        + (0 if on_gpu else _copied_bytes(parts, ops, dtype)),
        hidden_size=hidden_size,
        widest_step=_widest(parts, hidden_size),
        notes=tuple(notes),
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of what tensors are stored in, each storage once."""
    tensors = list(tensors)
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]
    opaque = {id(tensor): tensor for tensor in tensors if tensor.is_mkldnn}
    return sum({each._cdata: each.nbytes() for each in storages}.values()) + sum(
        tensor.numel() * tensor.dtype.itemsize for tensor in opaque.values()
    )


def parts_of(root: object, *, skip: tuple[object, ...]) -> Iterator[object]:
    """All objects that `root` holds on to, itself included, each once, in the order they lie."""
    seen = {id(part) for part in skip}
    waiting = [root]
    while waiting:
        part = waiting.pop()
        if id(part) in seen or part is None or isinstance(part, _LEAVES):
            continue
        seen.add(id(part))
        yield part
        if not isinstance(part, Tensor):
            waiting += reversed(list(_held(part)))


def _open(config: EngineConfig, folder: Path, notes: list[str]) -> Checkpoint | RandomCheckpoint:
    """The headers that are there, or else a config.json for which any tensor would do."""
    alone = RandomCheckpoint(folder, config.execution.seed)
    if config.model.load_format == "dummy" or not any(folder.glob("*.safetensors")):
        return alone
    try:
        found = Checkpoint(folder)
    except ModelError as error:
        notes.append(f"sizes are by config.json alone: {error}")
        return alone
    complete(found)
    return found


def _backend(
    config: EngineConfig, dtype: torch.dtype, plugins: pluggy.PluginManager, notes: list[str]
) -> Ops:
    """The backend of a GPU, which need not be here: on "meta" it has shapes and preferences."""
    name = config.execution.backend
    if name is None:
        name = "triton" if "triton" in collect(plugins, "pagedcore_backends") else "torch"
    try:
        ops: Ops = choose(plugins, "pagedcore_backends", name)("meta")
    except ConfigError as error:
        notes.append(f"block_size is that of plain torch, since {name!r} cannot be asked: {error}")
        return TorchOps("meta")
    return ops


def _held(part: Any) -> Iterator[object]:
    """What an object of any kind holds."""
    if isinstance(part, Mapping):
        yield from part.values()
    elif isinstance(part, list | tuple | set | frozenset):
        yield from part
    elif isinstance(part, MethodType):
        yield part.__self__
    elif isinstance(part, FunctionType):
        yield from (cell.cell_contents for cell in part.__closure__ or ())
    elif isinstance(part, functools.partial):
        yield from (part.func, part.args, part.keywords)
    else:
        yield from getattr(part, "__dict__", {}).values()
        for kind in type(part).__mro__:
            names = vars(kind).get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                yield getattr(part, name, None)


def _copied_bytes(parts: Iterable[object], ops: Ops, dtype: torch.dtype) -> int:
    """Bytes of heads that a backend of the CPU keeps twice: as they are, and packed."""
    probe = torch.zeros(64, 64, dtype=dtype)
    if ops.pack_linear(probe) is probe:
        return 0
    return storage_bytes(part.weight for part in parts if isinstance(part, Head))


def _widest(parts: list[object], hidden_size: int) -> int:
    """See `Survey.widest_step`; `parts` are a model's, in the order in which it runs them."""
    products: list[tuple[int, int]] = []
    chosen = 1
    for part in parts:
        if isinstance(part, Routing):
            chosen = part.num_chosen
        elif isinstance(part, Experts):
            rows = chosen * part.shape[2]  # of a token, once through each of its experts
            products += [(hidden_size, rows), (0, (chosen + 1) * hidden_size)]  # and their sum
        elif hasattr(part, "in_features") and hasattr(part, "out_features"):
            products.append((int(part.in_features), int(part.out_features)))
    sums = [inputs + outputs for inputs, outputs in products]
    return max(map(sum, zip(sums, [*sums[1:], 0], strict=True)), default=0)
