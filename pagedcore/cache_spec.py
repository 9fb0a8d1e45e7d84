"""What a layer keeps of the past, and which layers share a block table.

A model declares one `CacheSpec` per layer. Layers with equal specs form a *group*, or several: one
block table per sequence and group, one look-up, one rule for what may be freed (semantics KV-6,
SLOT-6).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

MAX_GROUPS = 8
"""About: each has a block table, and a look-up for each prompt."""

VectorBytes = Callable[[int], int]
"""Bytes in which a key or a value of so many elements is kept, by the cache's format."""


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

    def bytes_per_block(self, block_size: int, vector_bytes: VectorBytes) -> int:
        """Bytes of one block in one layer."""
        num_vectors = (1 if self.latent else 2) * block_size * self.num_kv_heads
        return num_vectors * vector_bytes(self.head_dim)


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers with one block table."""

    spec: CacheSpec
    layers: tuple[int, ...]


def group_layers(specs: Sequence[CacheSpec | None]) -> tuple[CacheGroup, ...]:
    """Group layers by spec, in order of first appearance; layers without a cache are in none.

    A block has room for as many layers as the largest group has, so a large group that forgets
    would make the blocks of a small one that does not mostly empty: it becomes several groups.
    """
    layers: dict[CacheSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        if spec is not None:
            layers.setdefault(spec, []).append(layer)
    return tuple(
        CacheGroup(spec, tuple(part))
        for spec, members in layers.items()
        for part in _cut(members, _most_together(spec, layers))
    )


def _most_together(spec: CacheSpec, layers: Mapping[CacheSpec, Sequence[int]]) -> int:
    """Layers that a group of this spec may have: those of the group that looks back furthest."""
    alike = [other for other in layers if replace(other, window=spec.window) == spec]
    furthest = max(alike, key=lambda other: math.inf if other.window is None else other.window)
    total = sum(len(layers[other]) for other in alike)
    most = max(len(layers[furthest]), -(-total // MAX_GROUPS))
    own = len(layers[spec])
    return most if own > 2 * most else own


def _cut(members: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Parts of about equal size, of at most so many."""
    count = -(-len(members) // most)
    for i in range(count):
        yield members[i * len(members) // count : (i + 1) * len(members) // count]
