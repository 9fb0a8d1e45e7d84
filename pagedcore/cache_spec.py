"""What a layer keeps of the past, and which layers share a block table.

A model declares one `CacheSpec` per layer. Layers with equal specs form a *group*: one block table
per sequence and group, one look-up, one rule for what may be freed (semantics KV-6, SLOT-6).
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """Keys and values of one layer for one position."""

    num_kv_heads: int
    """Heads that are stored."""

    head_dim: int
    """Elements per head."""

    window: int | None = None
    """Positions that attention looks back, itself included; None is all of them."""

    latent: bool = False
    """One latent vector in place of keys and values (MLA): half the bytes (semantics MEM-5)."""

    def bytes_per_block(self, block_size: int, itemsize: int) -> int:
        """Bytes of one block in one layer."""
        return (1 if self.latent else 2) * block_size * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers with one block table."""

    spec: CacheSpec
    layers: tuple[int, ...]


def group_layers(specs: Sequence[CacheSpec | None]) -> tuple[CacheGroup, ...]:
    """Group layers by spec, in order of first appearance; layers without a cache are in none."""
    layers: dict[CacheSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        if spec is not None:
            layers.setdefault(spec, []).append(layer)
    return tuple(CacheGroup(spec, tuple(members)) for spec, members in layers.items())
