"""Cohere: attention and MLP side by side behind one norm; Cohere2 alternates windows and no rope.

T tokens   h hidden size   H query heads   K kv heads   D head size
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, Embedding, GatedMLP, Head
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import LayerCache, StepBatch
from pagedcore.execution.plain_layers import LayerNorm
from pagedcore.execution.quantizer import join_rows
from pagedcore.execution.rope import make_rope
from pagedcore_models.decoder import DecoderSizes
from pagedcore_models.plain_decoder import PlainDecoder


class HeadNorm:
    """A LayerNorm on each head of queries and keys, each with a weight of its own."""

    def __init__(self, build: ModelBuild, prefix: str, sizes: DecoderSizes) -> None:
        shares = build.shard.heads(prefix, sizes.num_heads, sizes.num_kv_heads)
        weights = []
        for name, share in zip(("q_norm", "k_norm"), shares, strict=True):
            build.weights.divide(f"{prefix}.{name}", share)
            shape = share.whole, sizes.head_dim
            weights.append(build.weights.take(f"{prefix}.{name}.weight", shape, dim=0))
        self._weight = join_rows(weights)  # [H + K, D]
        self._eps = sizes.eps

    def __call__(self, qkv: Tensor) -> None:
        """Change qkv [T, (H + 2K) * D] in place."""
        num_heads, head_dim = self._weight.shape
        heads = qkv.view(len(qkv), -1, head_dim)[:, :num_heads]
        normed = functional.layer_norm(heads.float(), (head_dim,), eps=self._eps)
        heads.copy_(normed.mul_(self._weight))


class ParallelLayer:
    """Attention and MLP read the same norm, and both are added to what the layer was given."""

    def __init__(
        self, build: ModelBuild, prefix: str, sizes: DecoderSizes, attention: Attention
    ) -> None:
        self.cache_spec = attention.cache_spec
        self._norm = LayerNorm(build, f"{prefix}.input_layernorm", sizes.h, sizes.eps, bias=False)
        self._attention = attention
        self._mlp = GatedMLP(build, f"{prefix}.mlp", sizes.h, sizes.mlp_width)

    def __call__(self, x: Tensor, batch: StepBatch, cache: LayerCache) -> Tensor:
        """x [T, h] to the same; x is given up."""
        normed = self._norm(x)
        return x.add_(self._attention(normed, batch, cache)).add_(self._mlp(normed))


class CohereForCausalLM(PlainDecoder):
    """Command R and R+, Aya."""

    default_theta = 500000.0

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(build.config, eps=("layer_norm_eps", 1e-5), tied=True)
        fields = ConfigFields(build.config)
        attention_bias = fields.flag("attention_bias", False)
        use_qk_norm = fields.flag("use_qk_norm", False)
        rope = make_rope(
            build.config,
            head_dim=sizes.head_dim,
            max_positions=build.max_positions,
            device=build.device,
            theta=self.default_theta,
        )
        rope = replace(rope, interleaved=True)

        def layer(prefix: str, window: int | None, has_rope: bool) -> ParallelLayer:
            attention = Attention(
                build,
                f"{prefix}.self_attn",
                sizes.h,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                rope=rope if has_rope else None,
                qkv_norm=HeadNorm(build, f"{prefix}.self_attn", sizes) if use_qk_norm else None,
                qkv_bias=attention_bias,
                output_bias=attention_bias,
                window=window,
            )
            return ParallelLayer(build, prefix, sizes, attention)

        embedding = Embedding(build, "model.embed_tokens", sizes.vocab_size, sizes.h)
        layers = [
            layer(f"model.layers.{i}", window, has_rope)
            for i, (window, has_rope) in enumerate(self.layer_kinds(fields, sizes.num_layers))
        ]
        tied = embedding if sizes.tied else None
        super().__init__(
            sizes.vocab_size,
            embedding=embedding,
            layers=layers,
            norm=LayerNorm(build, "model.norm", sizes.h, sizes.eps, bias=False),
            head=Head(build, "lm_head", sizes.vocab_size, sizes.h, tied),
            logit_scale=fields.number("logit_scale", 0.0625),
        )

    def layer_kinds(
        self, fields: ConfigFields, num_layers: int
    ) -> Sequence[tuple[int | None, bool]]:
        """For each layer, how far it looks back, and whether its heads turn with the position."""
        return [(None, True)] * num_layers


class Cohere2ForCausalLM(CohereForCausalLM):
    """Command R7B and Command A: layers with a window turn, those that see everything do not."""

    default_theta = 10000.0

    def layer_kinds(
        self, fields: ConfigFields, num_layers: int
    ) -> Sequence[tuple[int | None, bool]]:
        """See `CohereForCausalLM.layer_kinds`."""
        window = fields.size("sliding_window", 4096)
        types = fields.values.get("layer_types")
        if types is None:  # as configs said it before transformers 5
            every = fields.size("sliding_window_pattern", 4)
            is_full = [(i + 1) % every == 0 for i in range(num_layers)]
        else:
            known = ("sliding_attention", "full_attention")
            is_list = type(types) is list and len(types) == num_layers
            if not is_list or any(kind not in known for kind in types):
                offence = f"must list one of {', '.join(known)} for each layer"
                raise fields.error("layer_types", offence)
            is_full = [kind == "full_attention" for kind in types]
        return [(None if full else window, not full) for full in is_full]
