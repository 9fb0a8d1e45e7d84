"""The layers of encoders, which see a prompt whole and keep nothing of it.

    T tokens   S sequences   h hidden size   H heads   D head size   F MLP width   n labels

As in `layers.py`, a layer takes its weights when it is made.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from pagedcore.execution.encoder_attention import encode_attention, rotate
from pagedcore.execution.layers import Linear
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import RopeTable, StepBatch
from pagedcore.execution.plain_layers import LayerNorm


class EncoderAttention:
    """Self-attention in both directions, with as many heads of keys as of queries."""

    def __init__(
        self,
        build: ModelBuild,
        qkv_names: Sequence[str],
        output_name: str,
        h: int,
        num_heads: int,
        *,
        bias: bool,
        rope: RopeTable | None = None,
        window: int | None = None,
    ) -> None:
        """`qkv_names` are those of queries, keys and values, or a single one of all three.

        With a `window`, a token sees so many before it, and as many behind it.
        """
        self._num_heads = num_heads
        self._scale = (h // num_heads) ** -0.5
        self._rope = rope
        self._window = window
        rows = [3 * h // len(qkv_names)] * len(qkv_names)
        self._qkv = Linear(build, qkv_names, h, rows, bias=bias, dim=0)
        self._output = Linear(build, [output_name], h, [h], bias=bias, dim=1)

    def __call__(self, x: Tensor, batch: StepBatch) -> Tensor:
        """x [T, h] to the same."""
        qkv = self._qkv(x)
        if self._rope is not None:
            rotate(qkv, self._num_heads, self._rope, batch)
        return self._output(
            encode_attention(qkv, self._num_heads, self._scale, batch, self._window)
        )


class PostNormLayer:
    """Attention, then a feed-forward part; each is added to what it was given, and then normed."""

    def __init__(
        self,
        attention: EncoderAttention,
        attention_norm: LayerNorm,
        feed_forward: Callable[[Tensor], Tensor],
        feed_forward_norm: LayerNorm,
    ) -> None:
        self._attention = attention
        self._attention_norm = attention_norm
        self._feed_forward = feed_forward
        self._feed_forward_norm = feed_forward_norm

    def __call__(self, x: Tensor, batch: StepBatch) -> Tensor:
        """x [T, h] to the same."""
        x = self._attention_norm(x + self._attention(x, batch))
        return self._feed_forward_norm(x + self._feed_forward(x))


class PreNormLayer:
    """Attention, then a feed-forward part; each behind a norm, and added to what it was given."""

    def __init__(
        self,
        attention_norm: LayerNorm | None,
        attention: EncoderAttention,
        feed_forward_norm: LayerNorm,
        feed_forward: Callable[[Tensor], Tensor],
    ) -> None:
        """Without `attention_norm`, the embedding's norm stands for the first layer's."""
        self._attention_norm = attention_norm
        self._attention = attention
        self._feed_forward_norm = feed_forward_norm
        self._feed_forward = feed_forward

    def __call__(self, x: Tensor, batch: StepBatch) -> Tensor:
        """x [T, h] to the same."""
        normed = x if self._attention_norm is None else self._attention_norm(x)
        x = x + self._attention(normed, batch)
        return x + self._feed_forward(self._feed_forward_norm(x))


class ClassifierHead:
    """Pooled hidden states to scores: one matrix, or another one and a function before it."""

    def __init__(
        self,
        build: ModelBuild,
        h: int,
        num_labels: int,
        *,
        inner: str | None,
        activation: Callable[[Tensor], Tensor],
        outer: str,
        inner_bias: bool = True,
        norm: LayerNorm | None = None,
    ) -> None:
        """`inner` and `outer` are the names of the matrices."""
        self._inner = None
        if inner is not None:
            self._inner = Linear(build, [inner], h, [h], bias=inner_bias, dim=None)
        self._activation = activation
        self._norm = norm
        self._outer = Linear(build, [outer], h, [num_labels], bias=True, dim=None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [S, h] to scores [S, n]."""
        if self._inner is not None:
            hidden = self._activation(self._inner(hidden))
        if self._norm is not None:
            hidden = self._norm(hidden)
        return self._outer(hidden)
