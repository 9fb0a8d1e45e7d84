"""Paged attention as an attention implementation of transformers.

    T tokens of a step   H query heads   K kv heads   D head size   E size of a value

An attention module of transformers hands queries, keys and values to a function that its config
names. Ours is registered once under IMPLEMENTATION, and asks the object that hangs on the module as
`paged`: a `Recorder` while a model of shapes alone is looked at, then that layer's `PagedLayer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.ops import LayerCache, Ops, StepBatch

IMPLEMENTATION = "pagedcore"

HARMLESS = frozenset(
    {
        "dropout",  # is 0 outside of training
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "output_attentions",
        "return_dict",
        "layer_idx",
    }
)
"""Options of a call that change nothing about what is computed."""


@dataclass(frozen=True, slots=True)
class Call:
    """How a module calls the attention function, every time."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def cache_spec(self) -> CacheSpec:
        """What the layer keeps; values are filled up with zeros to the size of keys."""
        return CacheSpec(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, window=self.window)


class UnsupportedAttentionError(Exception):
    """A module wants something of attention that no operation here does; says what."""


class Paged(Protocol):
    """What hangs on an attention module."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """query [1, H, T, D], key [1, K, T, D] and value [1, K, T, E] to [1, T, H, E]."""
        ...


class Recorder:
    """Learns from a run over shapes alone how each module calls."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, Call] = {}
        """In the order of the layers."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """See `Paged`. Raises UnsupportedAttentionError."""
        if module in self.calls:
            raise UnsupportedAttentionError("several layers share one attention module")
        options = {k: v for k, v in options.items() if v is not None and k not in HARMLESS}
        scale = options.pop("scaling", query.shape[-1] ** -0.5)
        window, soft_cap = options.pop("sliding_window", None), options.pop("softcap", None)
        options.pop("s_aux", None)  # sinks, which each call brings
        if options.pop("is_causal", True) is not True or not getattr(module, "is_causal", True):
            raise UnsupportedAttentionError("its attention is not causal")
        if options:
            raise UnsupportedAttentionError(f"its attention asks for {', '.join(sorted(options))}")
        if key.shape[2] != query.shape[2]:
            raise UnsupportedAttentionError("it keeps keys and values of its own")
        if value.shape[-1] > key.shape[-1]:
            raise UnsupportedAttentionError("its values are longer than its keys")
        call = Call(
            query.shape[1],
            key.shape[1],
            query.shape[-1],
            value.shape[-1],
            float(scale),
            window,
            soft_cap,
        )
        self.calls[module] = call
        return query.new_empty(1, query.shape[2], call.num_heads, call.value_dim)


@dataclass(slots=True)
class Step:
    """What the layers of a model have in common while a step runs."""

    batch: StepBatch | None = None
    caches: Sequence[LayerCache | None] | None = None


class PagedLayer:
    """One layer's attention over the paged cache."""

    def __init__(self, ops: Ops, call: Call, index: int, step: Step) -> None:
        """`index` is the layer's among the caches, and `step` is filled before a run."""
        self._ops = ops
        self._call = call
        self._index = index
        self._step = step

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """See `Paged`."""
        call, batch, caches = self._call, self._step.batch, self._step.caches
        assert batch is not None, "no step runs"
        assert caches is not None, "no step runs"
        cache = caches[self._index]
        assert cache is not None, "attention keeps a cache"
        if call.value_dim < call.head_dim:
            value = functional.pad(value, (0, call.head_dim - call.value_dim))
        heads = torch.cat([query, key, value], 1)[0]  # [H + 2K, T, D]
        qkv = heads.transpose(0, 1).reshape(heads.shape[1], -1)
        self._ops.rope_and_cache(qkv, call.num_heads, None, None, cache, batch)
        sinks: Tensor | None = options.get("s_aux")
        mixed = self._ops.attention(
            qkv,
            call.num_heads,
            call.scale,
            cache,
            batch,
            soft_cap=call.soft_cap,
            sinks=None if sinks is None else sinks.float(),
        )
        return mixed.view(1, len(mixed), call.num_heads, call.head_dim)[..., : call.value_dim]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls."""
    paged: Any = module.paged
    return paged(module, query, key, value, options | {"attention_mask": attention_mask}), None


def register() -> None:
    """Make IMPLEMENTATION known to transformers: an entry more in its table, and nothing else."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
