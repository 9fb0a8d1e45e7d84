"""What the operations in plain torch share: angles, norms, slots, and what a step derives once.

T tokens   D head size   N blocks   B positions per block
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pagedcore.execution.ops import LayerCache, RopeTable, StepBatch
from pagedcore.execution.torch_attention import Plan, begun_blocks, plan_attention


def once(batch: StepBatch, key: object, make: Callable[[], Any]) -> Any:
    """What `make` derives from the step: once, if the step's layers share."""
    if batch.shared is None:
        return make()
    if key not in batch.shared:
        batch.shared[key] = make()
    return batch.shared[key]


def shared_plan(batch: StepBatch, cache: LayerCache, dtype: torch.dtype) -> Plan:
    """What attention does alike in all layers of a group, since their specs are equal."""

    def make() -> Plan:
        return plan_attention(batch, cache.group, cache.block_size, cache.spec, dtype)

    found: Plan = once(batch, ("attention", cache.group, dtype), make)
    return found


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., h] float32 over its last dimension, times weight."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight)


def angles(rope: RopeTable, batch: StepBatch) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, rotated] by which `rotate` multiplies each element."""
    cos, sin = rope.cos_sin.index_select(0, batch.positions)[:, None].chunk(2, -1)
    if rope.interleaved:
        pairs = torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)
        return pairs[0].flatten(-2), pairs[1].flatten(-2)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(heads: Tensor, rope: RopeTable, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the leading elements of heads [T, heads, D] float32."""
    rotated = cos.shape[-1]
    head = heads[..., :rotated]
    if rope.interleaved:
        other = head.view(*head.shape[:2], -1, 2).flip(-1).flatten(-2)
    else:
        other = head.roll(rotated // 2, -1)
    turned = (head * cos).addcmul_(other, sin)
    return torch.cat([turned, heads[..., rotated:]], -1) if rotated < heads.shape[-1] else turned


def write_slots(rows: Tensor, cache: LayerCache, batch: StepBatch) -> None:
    """Write rows [T, heads, D] into slots of the cache; blocks that begin are cleared."""
    slots = batch.slots[cache.group]
    begun = once(batch, ("begun", cache.group), lambda: begun_blocks(slots, cache.block_size))
    store, (codes, scale) = cache.key, cache.kv_format.encode(rows)
    if store.itemsize == 1:  # there is no indexing for float8
        store, codes = store.view(torch.uint8), codes.view(torch.uint8)
    if len(begun):
        store.index_fill_(0, begun, 0)
    store.flatten(0, 1).index_copy_(0, slots, codes)
    if cache.key_scale is not None and scale is not None:
        if len(begun):
            cache.key_scale.index_fill_(0, begun, 0)
        cache.key_scale.flatten(0, 1).index_copy_(0, slots, scale)
