"""The layers that models are written with.

    T tokens   S sequences   h hidden size   H query heads   K kv heads   D head size   V vocabulary

A layer takes its weights when it is made, from `ModelBuild.weights`, through the quantizer where it
multiplies; calling it only calls the backend's operations, so that a step can be captured. Matrices
say which of their dimensions tensor parallelism divides: `dim=0` the outputs, `dim=1` the inputs,
None nothing.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import LayerCache, QKNorm, RopeTable, StepBatch
from pagedcore.execution.quantized import Activations, Grouped
from pagedcore.execution.quantizer import HeadQuantizer, join_rows
from pagedcore.execution.shard import Share
from pagedcore.execution.torch_quantized import widen_grouped

GATES = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new")
"""Activations that `GatedMLP` has, by the names that a config.json has for them."""


class Consumer(Protocol):
    """What multiplies first with what it is given."""

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """Whether so many rows of `dtype` are better given in 8 bits."""
        ...


class FeedForward(Consumer, Protocol):
    """What follows attention in a layer."""

    def __call__(self, x: Activations) -> Tensor:
        """Map x [T, h] to [T, h]."""
        ...


class Mixer(Consumer, Protocol):
    """What looks at other tokens in a layer, such as attention."""

    @property
    def cache_spec(self) -> CacheSpec:
        """What it keeps of the past."""
        ...

    def __call__(self, x: Activations, batch: StepBatch, cache: LayerCache) -> Tensor:
        """Map x [T, h] to [T, h]; what it keeps of the step's tokens is left in the cache."""
        ...


class Linear:
    """One matrix, or several with the same input that are multiplied as one."""

    def __init__(
        self,
        build: ModelBuild,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool = False,
        dim: int | None,
        shares: Sequence[Share] | None = None,
    ) -> None:
        """`names` are those of the parts, without `.weight`, and `out_features` their outputs.

        Ranks divide outputs (`dim` 0) as `shares` say for each part, and by default evenly, as they
        divide inputs (1). All of them get the sum of their products, with the bias once.
        """
        self.in_features, self.out_features = in_features, sum(out_features)
        if build.shard.size > 1 and dim is not None:
            sizes = out_features if dim == 0 else [in_features] * len(names)
            for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
                what = f"the {'inputs' if dim else 'outputs'} of {name}"
                build.weights.divide(name, shares[i] if shares else build.shard.even(what, size))
        self._method = build.quantizer.linear(
            build.weights, build.ops, names, in_features, out_features, bias=bias, dim=dim
        )

    def __call__(self, x: Activations) -> Tensor:
        """x [T, in] to [T, out], the parts' outputs beside each other."""
        return self._method.apply(x)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `Consumer.wants_quantized`."""
        return self._method.wants_quantized(num_tokens, dtype)


class Embedding:
    """A vector for each token. Every rank has all: a look-up costs less than adding up shares."""

    def __init__(
        self, build: ModelBuild, name: str, vocab_size: int, h: int, scale: float = 1.0
    ) -> None:
        """Vectors count `scale` times, here and not in a head that is tied to them."""
        self.weight = build.weights.take(f"{name}.weight", (vocab_size, h))
        self._scale = scale

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Token ids [T] to [T, h]."""
        found = functional.embedding(token_ids, self.weight)
        return found if self._scale == 1.0 else found.mul_(self._scale)


class Head:
    """Scores of all tokens."""

    def __init__(
        self, build: ModelBuild, name: str, vocab_size: int, h: int, tied: Embedding | None = None
    ) -> None:
        """With `tied`, the head is the embedding.

        A checkpoint may hold a tied head nevertheless. It is dropped if it is equal, and otherwise
        believed: that is a model which was untied without its config.json saying so.

        Ranks divide the vocabulary. Rows of zeros make the last rank's share as large as the
        others', and no score comes of them.
        """
        self._ops = build.ops
        self._vocab_size = vocab_size
        self._collective = None if build.shard.size == 1 else build.shard.collective
        weight = None if tied is None else tied.weight
        if self._collective is not None:
            share = build.shard.longest(vocab_size)
            build.weights.divide(name, share)
            weight = None if weight is None else _rows(weight, share.ranges[0])
        stored = None
        if weight is None or build.weights.has(f"{name}.weight"):
            own, stored = _take_head(build, name, vocab_size, h)
            if weight is None or own.is_meta or not torch.equal(own, weight):
                weight = own
        if self._collective is not None:
            weight = _with_rows(weight, -(-vocab_size // build.shard.size))
        self.weight = weight
        stored = stored if self._collective is None else None
        self._packed = weight if weight.is_meta else build.ops.pack_head(weight, stored)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [S, h] to scores [S, V]."""
        scores = self._ops.scores(hidden, self.weight, self._packed)
        if self._collective is None:
            return scores
        gathered = self._collective.all_gather(scores, 1)
        return gathered[:, : self._vocab_size].contiguous()


def _take_head(
    build: ModelBuild, name: str, vocab_size: int, h: int
) -> tuple[Tensor, Grouped | None]:
    """A head in the model's type, and what the checkpoint has of it in few bits, if it does."""
    stored = None
    if isinstance(build.quantizer, HeadQuantizer):
        stored = build.quantizer.head(build.weights, name, vocab_size, h)
    if stored is None:
        return build.weights.take(f"{name}.weight", (vocab_size, h), dim=0), None
    if stored.codes.is_meta:
        return torch.empty(stored.shape, dtype=build.dtype, device="meta"), stored
    return widen_grouped(stored, build.dtype), stored


class RMSNorm:
    """Normalises by the root mean square."""

    def __init__(
        self, build: ModelBuild, name: str, size: int, eps: float, *, offset: float = 0.0
    ) -> None:
        """`offset` is added to the weight: Gemma stores its difference from 1."""
        self._ops = build.ops
        self._weight = _shifted(build.weights.take(f"{name}.weight", (size,)), offset)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, h] to [T, h]."""
        return self._ops.rms_norm(x, self._weight, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum, all [T, h]; both inputs are given up."""
        return self._ops.add_rms_norm(x, residual, self._weight, self._eps)

    def add_for(
        self, consumer: Consumer, x: Tensor, residual: Tensor
    ) -> tuple[Activations, Tensor]:
        """As `add`, with the norm in the form that `consumer` multiplies fastest."""
        if consumer.wants_quantized(len(x), x.dtype):
            return self._ops.add_rms_norm_quantized(x, residual, self._weight, self._eps)
        return self.add(x, residual)


class Attention:
    """Causal self-attention over a paged cache, with grouped heads and rotary positions."""

    def __init__(
        self,
        build: ModelBuild,
        prefix: str,
        h: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: RopeTable | None,
        qk_norm_eps: float | None = None,
        qk_norm_offset: float = 0.0,
        qkv_norm: Callable[[Tensor], None] | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        window: int | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        has_sinks: bool = False,
        qkv_names: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
        output_name: str = "o_proj",
    ) -> None:
        """`scale` is 1 / sqrt(D) by default; `qk_norm_eps` None means that heads have no norm.

        `qk_norm_offset` is added to the weights of the heads' norms, as in `RMSNorm`. `qkv_norm`
        changes [T, (H + 2K) * D] in place before the rotation, where the norm is another than
        `QKNorm`; of several ranks, each has the heads that `Shard.heads` says. `has_sinks` takes
        one more score of each head, without a value (see `Ops.attention`), from `{prefix}.sinks`. A
        single one of `qkv_names` holds queries, keys and values below each other.
        """
        if window is not None and window >= build.max_positions:
            window = None  # it reaches over all that a sequence can be: no group of its own
        query, key = build.shard.heads(prefix, num_heads, num_kv_heads)
        self.cache_spec = CacheSpec(num_kv_heads=key.own, head_dim=head_dim, window=window)
        self._ops = build.ops
        self._num_heads = query.own
        self._scale = head_dim**-0.5 if scale is None else scale
        self._soft_cap = soft_cap
        self._sinks: Tensor | None = None
        if has_sinks:
            self._sinks = build.weights.take(
                f"{prefix}.sinks", (num_heads,), dtype=torch.float32, dim=0
            )
        self._rope = rope
        self._qkv_norm = qkv_norm
        build.weights.ignore(f"{prefix}.rotary_emb.")  # frequencies that old checkpoints hold
        shares = [heads.times(head_dim) for heads in (query, key, key)]
        shares = shares if len(qkv_names) > 1 else [Share.join(shares)]
        self._qkv = Linear(
            build,
            [f"{prefix}.{name}" for name in qkv_names],
            h,
            [share.whole for share in shares],
            bias=qkv_bias,
            dim=0,
            shares=shares,
        )
        self._output = Linear(
            build, [f"{prefix}.{output_name}"], num_heads * head_dim, [h], bias=output_bias, dim=1
        )
        self._norm: QKNorm | None = None
        if qk_norm_eps is not None:
            norms = (
                build.weights.take(f"{prefix}.{part}_norm.weight", (head_dim,)) for part in "qk"
            )
            query_norm, key_norm = (_shifted(norm, qk_norm_offset) for norm in norms)
            self._norm = QKNorm(query_norm, key_norm, qk_norm_eps)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `Consumer.wants_quantized`."""
        return self._qkv.wants_quantized(num_tokens, dtype)

    def __call__(self, x: Activations, batch: StepBatch, cache: LayerCache) -> Tensor:
        """x [T, h] to [T, h]; the step's keys and values are left in the cache."""
        qkv = self._qkv(x)
        if self._qkv_norm is not None:
            self._qkv_norm(qkv)
        self._ops.rope_and_cache(qkv, self._num_heads, self._rope, self._norm, cache, batch)
        mixed = self._ops.attention(
            qkv,
            self._num_heads,
            self._scale,
            cache,
            batch,
            soft_cap=self._soft_cap,
            sinks=self._sinks,
        )
        return self._output(mixed)


class GatedMLP:
    """down(activation(gate(x)) * up(x))."""

    def __init__(
        self,
        build: ModelBuild,
        prefix: str,
        h: int,
        width: int,
        *,
        bias: bool = False,
        names: Sequence[str] = ("gate_proj", "up_proj"),
        activation: str = "silu",
    ) -> None:
        """A single one of `names` holds the gate and what it opens for, below each other.

        `activation` is one of GATES.
        """
        assert activation in GATES, f"a gate cannot be a {activation}"
        self._ops = build.ops
        self._activation = activation
        parts = [f"{prefix}.{name}" for name in names]
        shares = [build.shard.even(f"the widths of {prefix}", width)] * 2
        shares = shares if len(names) > 1 else [Share.join(shares)]
        rows = [share.whole for share in shares]
        self._gate_up = Linear(build, parts, h, rows, bias=bias, dim=0, shares=shares)
        self._down = Linear(build, [f"{prefix}.down_proj"], width, [h], bias=bias, dim=1)

    def wants_quantized(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """See `Consumer.wants_quantized`."""
        return self._gate_up.wants_quantized(num_tokens, dtype)

    def __call__(self, x: Activations) -> Tensor:
        """x [T, h] to [T, h]."""
        gate_up = self._gate_up(x)
        if self._activation != "silu":
            tanh = self._activation != "gelu"
            return self._down(self._ops.gelu_mul(gate_up, tanh=tanh))
        if self._down.wants_quantized(len(gate_up), gate_up.dtype):
            return self._down(self._ops.silu_mul_quantized(gate_up))
        return self._down(self._ops.silu_mul(gate_up))


class DecoderLayer:
    """Attention, then a feed-forward part; each behind a norm, and added to what it was given."""

    def __init__(
        self,
        build: ModelBuild,
        prefix: str,
        h: int,
        eps: float,
        attention: Mixer,
        feed_forward: FeedForward,
        *,
        norm_names: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
        norm_offset: float = 0.0,
        then: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        """`then` is done to what attention and the feed-forward part return, before it is added.

        Either maps [T, h] to [T, h], such as one more norm, and may overwrite what it is given.
        """
        self.cache_spec = attention.cache_spec
        self._attention_norm, self._feed_forward_norm = (
            RMSNorm(build, f"{prefix}.{name}", h, eps, offset=norm_offset) for name in norm_names
        )
        self._attention = attention
        self._feed_forward = feed_forward
        self._then = then

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: StepBatch, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """x and residual [T, h] to the same, of which the sum is the stream; None is a zero."""
        assert cache is not None, "attention keeps a cache"
        normed: Activations
        if residual is None:
            normed, residual = self._attention_norm(x), x
        else:
            normed, residual = self._attention_norm.add_for(self._attention, x, residual)
        x = self._attention(normed, batch, cache)
        if self._then is not None:
            x = self._then[0](x)
        normed, residual = self._feed_forward_norm.add_for(self._feed_forward, x, residual)
        x = self._feed_forward(normed)
        if self._then is not None:
            x = self._then[1](x)
        return x, residual


def _shifted(weight: Tensor, offset: float) -> Tensor:
    """A norm's weight plus an offset: in float32, since near 1 bfloat16 has only 8 bits."""
    return weight if weight.is_meta or not offset else weight.float() + offset


def _rows(weight: Tensor, rows: range) -> Tensor:
    """Some rows of a weight, which share its memory."""
    if weight.is_meta:
        return weight.new_empty((len(rows), *weight.shape[1:]))
    return weight[rows.start : rows.stop]


def _with_rows(weight: Tensor, count: int) -> Tensor:
    """The weight with rows of zeros below, so that there are `count`."""
    missing = count - len(weight)
    return join_rows([weight, weight.new_zeros(missing, weight.shape[1])]) if missing else weight
