"""What a plan says: where a device's memory goes, and what can be served with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Limit = Literal["memory", "max_num_seqs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that need not be here."""

    total_bytes: int
    """As the driver tells it."""

    is_a100: bool = False
    """Whose default limits are smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """Layers with one block table."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    is_latent: bool
    bytes_per_token: int
    """What its layers keep of one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change that makes a plan fit, and what comes of it."""

    change: str
    result: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the memory goes, and what can be served with it. Sizes are in bytes."""

    architecture: str
    device: str
    """`gpu` or `cpu`."""
    dtype: str
    cache_dtype: str
    quantization: str
    backend: str

    total_bytes: int
    """Of the device."""
    requested_bytes: int
    """For this engine: weights, step, cache and what lies outside."""
    weight_bytes: int
    step_bytes: int
    """The largest step's peak: an estimate. 0 on the CPU, where it is not set aside."""
    outside_bytes: int
    """Set aside for the driver's context, kernels and graphs. 0 on the CPU."""
    cache_bytes: int
    """Of all blocks."""
    row_bytes: int
    """Tokens and block tables of all rows, which are allocated beside the cache."""

    groups: tuple[GroupPlan, ...]
    block_size: int
    block_bytes: int
    num_blocks: int
    """With the null block."""
    kv_bytes_per_token: int
    """What one more token of a sequence takes of the cache, within every window."""

    max_model_len: int
    longest_that_fits: int
    """Tokens of one sequence alone, whatever the model allows."""
    max_num_seqs: int
    max_num_batched_tokens: int
    concurrency: float | None
    """Sequences of max_model_len that the cache holds; None where nothing is kept."""
    limit: Limit
    """What binds when all sequences are as long as they may be."""
    concurrency_by_length: Mapping[int, int]
    """Sequences at a time, by their length."""

    problem: str | None = None
    """Why a start would fail."""
    remedies: tuple[Remedy, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a start would succeed."""
        return self.problem is None
