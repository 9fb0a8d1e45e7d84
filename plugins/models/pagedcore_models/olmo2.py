"""OLMo 2: norms behind the parts of a layer, not before, and over all heads of queries and keys."""

from torch import Tensor

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.divided_norm import divided_rms_norm
from pagedcore.execution.layers import GATES, Attention, GatedMLP, RMSNorm
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import LayerCache, StepBatch
from pagedcore_models.decoder import Decoder, DecoderSizes


class ProjectionNorm:
    """RMSNorm over all queries of a token, and over all its keys."""

    def __init__(self, build: ModelBuild, prefix: str, sizes: DecoderSizes) -> None:
        heads = build.shard.heads(prefix, sizes.num_heads, sizes.num_kv_heads)
        shares = [share.times(sizes.head_dim) for share in heads]
        self._widths = [share.own for share in shares]
        self._norms = [
            divided_rms_norm(build, f"{prefix}.{part}_norm", share, sizes.eps)
            for part, share in zip("qk", shares, strict=True)
        ]

    def __call__(self, qkv: Tensor) -> None:
        """Norm the front of qkv [T, (H + 2K) * D] in place."""
        parts = qkv[:, : sum(self._widths)].split(self._widths, 1)
        for part, norm in zip(parts, self._norms, strict=True):
            part.copy_(norm(part))


class PostNormLayer:
    """Attention, then an MLP; each before a norm, and added to what it was given."""

    def __init__(
        self,
        build: ModelBuild,
        prefix: str,
        sizes: DecoderSizes,
        attention: Attention,
        mlp: GatedMLP,
    ) -> None:
        self.cache_spec = attention.cache_spec
        self._attention = attention
        self._mlp = mlp
        self._attention_norm, self._mlp_norm = (
            RMSNorm(build, f"{prefix}.post_{part}_layernorm", sizes.h, sizes.eps)
            for part in ("attention", "feedforward")
        )

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: StepBatch, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """See `Layer`."""
        assert cache is not None, "attention keeps a cache"
        stream = x if residual is None else residual.add_(x)
        stream.add_(self._attention_norm(self._attention(stream, batch, cache)))
        return self._mlp_norm(self._mlp(stream)), stream


class Olmo2ForCausalLM(Decoder):
    """OLMo 2: 1B to 32B."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        sizes = DecoderSizes.read(build.config, eps=("rms_norm_eps", 1e-5), activations=GATES)
        attention_bias = ConfigFields(build.config).flag("attention_bias", False)
        rope = sizes.rope(build)

        def layer(prefix: str) -> PostNormLayer:
            attention = Attention(
                build,
                f"{prefix}.self_attn",
                sizes.h,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                rope=rope,
                qkv_norm=ProjectionNorm(build, f"{prefix}.self_attn", sizes),
                qkv_bias=attention_bias,
                output_bias=attention_bias,
            )
            mlp = GatedMLP(
                build, f"{prefix}.mlp", sizes.h, sizes.mlp_width, activation=sizes.activation
            )
            return PostNormLayer(build, prefix, sizes, attention, mlp)

        layers = [layer(f"model.layers.{i}") for i in range(sizes.num_layers)]
        super().__init__(build, sizes, layers)
