"""The operations that models are made of: the protocol that every backend implements.

`pagedcore.execution.torch_ops.TorchOps` implements each in plain torch: that is the CPU path, and
the specification that other backends are tested against. Letters:

    T tokens in the step      S sequences      R rows        M table entries per row
    H query heads             K kv heads       D head size   F MLP width        V vocabulary

Tensors that share a step have one device. Results may alias no input unless an operation says so.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.expert_ops import ExpertOps
from pagedcore.execution.kv_formats import KVFormat
from pagedcore.execution.lora_ops import AdapterStep, LoraOps
from pagedcore.execution.quantized import Grouped, QuantizedOps


@dataclass(slots=True)
class StepBatch:
    """Where the tokens of one step stand, and where their sequences keep the past.

    The first `num_single` sequences run one token each and are the first `num_single` tokens; the
    others run `query_start[i + 1] - query_start[i]` tokens each. Padding (in graphs) has a row
    whose table names the null block alone, and its slots lie there: what it reads is of no use. A
    single sequence of padding may have length 0 in `context_len`.
    """

    positions: Tensor
    """[T] int64. Position of each token in its sequence."""

    rows: Tensor
    """[S] int32. Row of each sequence, in `block_tables`."""

    query_start: Tensor
    """[S + 1] int32. First token of each sequence; the last entry is T."""

    context_len: Tensor
    """[S] int32. Positions that are valid once the step's keys are written, its tokens included."""

    block_tables: Tensor
    """[G, R, M] int32. Blocks of each row, by cache group. Not gathered: index with `rows`."""

    slots: Tensor
    """[G, T] int64. block * block_size + offset of each token, by cache group."""

    num_single: int
    """Sequences at the front that run exactly one token."""

    max_query_len: int
    """Most tokens of one sequence in the step."""

    max_context_len: int
    """Upper bound of `context_len`, on the host."""

    shared: dict[Any, Any] | None = None
    """What a backend derives once for all layers of a step; see `Ops.begin_step`."""

    token_types: Tensor | None = None
    """[T] int64. 1 for tokens of the second of two texts, else 0; None is all 0."""

    adapters: AdapterStep | None = None
    """Which adapters tokens have; None where nobody has any."""


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer. Only the backend that made it knows the layout.

    A cache of latent vectors has them in `key`, and `value` is the same tensor. Where the format
    has a scale for each vector, scales are tensors of their own, laid out like what they are of.
    """

    spec: CacheSpec
    group: int
    block_size: int
    kv_format: KVFormat
    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


@dataclass(slots=True)
class RopeTable:
    """Rotary angles: `rotated` leading elements of a head turn, the others pass."""

    cos_sin: Tensor
    """[max_positions, rotated] float32: cosines of the rotated // 2 angles, then their sines."""

    interleaved: bool = False
    """Pairs are neighbours (GPT-J); otherwise element i pairs with i + rotated // 2 (NeoX)."""


@dataclass(slots=True)
class QKNorm:
    """RMSNorm over each query and key head, before rotation (Qwen3)."""

    query_weight: Tensor
    """[D]"""

    key_weight: Tensor
    """[D]"""

    eps: float


@dataclass(slots=True)
class SamplingTensors:
    """How to draw one token for each of S rows of logits (semantics SAMPLE-5, SAMPLE-7)."""

    temperature: Tensor
    """[S] float32; 0 takes the most likely token."""

    min_p: Tensor
    """[S] float32; 0 keeps all."""

    top_k: Tensor
    """[S] int32; 0 keeps all."""

    top_p: Tensor
    """[S] float32; 1 keeps all."""

    uniform: Tensor
    """[S] float32 in [0, 1): the draw."""

    all_greedy: bool
    """Known on the host: every temperature is 0."""

    any_filter: bool
    """Known on the host: some row uses min_p, top_k or top_p."""


class Ops(QuantizedOps, ExpertOps, LoraOps, Protocol):
    """One backend. A factory in the `pagedcore_backends` hook makes it, for one device."""

    name: str
    """As in `--backend`."""

    block_size: int
    """Preferred positions per block."""

    supports_graphs: bool
    """Whether a step may be captured: no operation reads a tensor on the host."""

    def begin_step(self, batch: StepBatch) -> None:
        """Forget what was derived from this batch before, and let the step's layers share anew.

        Called before the first layer of every run over the batch, inside the graph while one is
        captured. Without it every layer derives again what it needs, which is right but slower.
        """
        ...

    def pack_linear(self, weight: Tensor) -> Tensor:
        """Weight [out, in] in the layout that `linear` is fastest with; called once, at the load.

        The result still has the shape [out, in]; only `linear` of the same backend may read it.
        """
        ...

    def decode_inputs(
        self,
        tokens: Tensor,
        block_tables: Tensor,
        rows: Tensor,
        positions: Tensor,
        block_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a step in which every sequence runs one token begins with, out of its rows' state.

        tokens [R, L] int32 by row, block_tables [G, R, M] int32, rows and positions [S] int64. The
        last of the R rows is padding. Returns token ids [S] int64, rows [S] int32, context lengths
        [S] int32 (positions + 1, and 0 for padding), and slots [G, S] int64.
        """
        ...

    def advance_rows(
        self, drawn: Tensor, logits: Tensor, tokens: Tensor, rows: Tensor, positions: Tensor
    ) -> Tensor:
        """What such a step ends with: each token takes its place, and each row moves on by one.

        drawn [S] int64 comes from logits [S, V]. Writes tokens[row, position + 1], and adds 1 to
        the positions of rows that are not padding. Returns int64 [S]: the tokens, or -1 - token
        where the token's logit is not finite.
        """
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] times a packed weight [out, in], plus bias [out]: [T, out] in x's dtype."""
        ...

    def pack_head(self, weight: Tensor, stored: Grouped | None) -> Tensor | Grouped:
        """A head's weight [V, h] in the layout that `scores` is fastest with; called once.

        `stored` is what the checkpoint has of it in few bits, which `weight` rounds to its type, or
        None. Only `scores` of the same backend may read the result.
        """
        ...

    def scores(self, hidden: Tensor, weight: Tensor, packed: Tensor | Grouped) -> Tensor:
        """The head: hidden [S, h] times weight [V, h]: [S, V] in any float type.

        `packed` is the same weight as `pack_head` left it. In each row the few largest scores
        are those of exact products with sums in float32, so that close ones keep their order.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise x [T, h] by its root mean square, in float32, then scale by weight [h]."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Add x to residual [T, h], rounded to their dtype; return (norm of the sum, the sum).

        Either input may be overwritten: the caller uses the results only.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2F], the gate first: silu(gate) * up, [T, F]."""
        ...

    def gelu_mul(self, gate_up: Tensor, *, tanh: bool) -> Tensor:
        """As `silu_mul` with gelu(gate); `tanh` takes the approximation by that function."""
        ...

    def cap_scores(self, scores: Tensor, cap: float) -> Tensor:
        """cap * tanh(scores / cap), float32, of what `scores` returned and gives up."""
        ...

    def new_cache(
        self,
        spec: CacheSpec,
        group: int,
        num_blocks: int,
        block_size: int,
        kv_format: KVFormat,
        device: torch.device,
    ) -> LayerCache:
        """Allocate one layer's cache in this backend's own layout; block 0 is the null block.

        It takes the bytes that spec and format say, and begins as zeros. Raises ConfigError, with
        the formats that there are, for one that this backend has no kernels for. A start asks for
        a cache on the device "meta" before it reads a weight.
        """
        ...

    def rope_and_cache(
        self,
        qkv: Tensor,
        num_heads: int,
        rope: RopeTable | None,
        norm: QKNorm | None,
        cache: LayerCache,
        batch: StepBatch,
    ) -> None:
        """Prepare attention: qkv [T, (H + 2K) * D] holds queries, keys, values of each token.

        Norms and rotates queries and keys in place, in float32 with one rounding at the end, and
        writes keys and values into the slots of the cache's group.
        """
        ...

    def attention(
        self,
        qkv: Tensor,
        num_heads: int,
        scale: float,
        cache: LayerCache,
        batch: StepBatch,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of each query over its sequence's cached positions: [T, H * D].

        `qkv` is as `rope_and_cache` left it, and the step's own keys are in the cache already. The
        cache's spec may limit the window: a query at position p sees p - window + 1 .. p. With
        `soft_cap` c, scores become c * tanh(score / c) before the softmax, which is in float32.
        `sinks` [H] float32 holds one more score for each head, which takes part in the softmax and
        has no value.
        """
        ...

    def latent_to_cache(
        self,
        query: Tensor,
        unturned: Tensor,
        latent: Tensor,
        rope: RopeTable,
        norm_weight: Tensor,
        eps: float,
        cache: LayerCache,
        batch: StepBatch,
    ) -> None:
        """Prepare latent attention (MLA), of vectors of D elements of which the last R turn.

        Writes the last R elements of each head of query [T, H, D], which is contiguous: those of
        unturned [T, H, R], rotated. Of latent [T, D], the first D - R elements are normed as in
        `rms_norm`, the others rotated, and the result goes into the slots of the cache's group.
        """
        ...

    def latent_attention(
        self, query: Tensor, num_values: int, scale: float, cache: LayerCache, batch: StepBatch
    ) -> Tensor:
        """Causal attention of each head over its sequence's latent vectors: [T, H, num_values].

        query [T, H, D] is as `latent_to_cache` left it. All heads see the same vectors, whose first
        `num_values` elements are what is mixed.
        """
        ...

    def copy_blocks(self, cache: LayerCache, copies: Tensor) -> None:
        """Copy the first n slots of source blocks: copies [C, 3] int32: source, destination, n."""
        ...

    def sample(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        """Draw one token from each row of logits [S, V]: int64 [S].

        The first index whose cumulative probability, over the tokens that the filters keep,
        exceeds `uniform`; so the same uniform gives the same token on every backend, up to
        rounding. Filters run in the order of SAMPLE-5: temperature, min_p, top-k, top-p. A row
        whose largest logit is not finite, where NaN counts as the largest of all, gives the token
        of that logit, whatever its temperature: so it can be seen there.
        """
        ...
