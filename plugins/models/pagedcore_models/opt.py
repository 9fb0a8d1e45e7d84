"""OPT: learned positions, LayerNorms before or behind each part, and a plain MLP.

T tokens   h hidden size   E embedding size
"""

from torch import Tensor

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, Embedding, Head, Linear
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import LayerCache, StepBatch
from pagedcore.execution.plain_layers import (
    ACTIVATIONS,
    LayerNorm,
    LearnedPositions,
    PlainLayer,
    PlainMLP,
)
from pagedcore_models.plain_decoder import PlainDecoder


class PostNormLayer:
    """Attention, then an MLP; each is added to what it was given, and the sum gets a LayerNorm."""

    def __init__(
        self,
        attention_norm: LayerNorm,
        attention: Attention,
        mlp_norm: LayerNorm,
        mlp: PlainMLP,
    ) -> None:
        self.cache_spec = attention.cache_spec
        self._attention_norm = attention_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    def __call__(self, x: Tensor, batch: StepBatch, cache: LayerCache) -> Tensor:
        """x [T, h] to the same; x is given up."""
        x = self._attention_norm(x.add_(self._attention(x, batch, cache)))
        return self._mlp_norm(x.add_(self._mlp(x)))


class OPTForCausalLM(PlainDecoder):
    """OPT from 125 million to 66 billion parameters, and Galactica."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        vocab_size, h = fields.size("vocab_size"), fields.size("hidden_size")
        num_heads = fields.size("num_attention_heads")
        if h % num_heads:
            raise fields.error("hidden_size", f"must be a multiple of the {num_heads} heads")
        width, embedding_size = fields.size("ffn_dim"), fields.size("word_embed_proj_dim", h)
        activation = fields.choice("activation_function", list(ACTIVATIONS), "relu")
        bias = fields.flag("enable_bias", True)
        is_affine = fields.flag("layer_norm_elementwise_affine", True)
        is_pre_norm = fields.flag("do_layer_norm_before", True)
        # Both names are in use
        root = "decoder" if build.weights.has("decoder.embed_tokens.weight") else "model.decoder"

        def norm(name: str) -> LayerNorm:
            return LayerNorm(build, name, h, 1e-5, weight=is_affine, bias=is_affine)

        def layer(prefix: str) -> PlainLayer | PostNormLayer:
            attention = Attention(
                build,
                f"{prefix}.self_attn",
                h,
                num_heads=num_heads,
                num_kv_heads=num_heads,
                head_dim=h // num_heads,
                rope=None,
                qkv_bias=bias,
                output_bias=bias,
                output_name="out_proj",
            )
            names = [f"{prefix}.fc1", f"{prefix}.fc2"]
            mlp = PlainMLP(build, names, h, width, activation=activation, bias=bias)
            attention_norm = norm(f"{prefix}.self_attn_layer_norm")
            mlp_norm = norm(f"{prefix}.final_layer_norm")
            kind = PlainLayer if is_pre_norm else PostNormLayer
            return kind(attention_norm, attention, mlp_norm, mlp)

        def projection(name: str, size: int, to: int) -> Linear | None:
            """From the embedding's size to that of the layers, or back, where they differ."""
            if embedding_size == h:
                return None
            return Linear(build, [f"{root}.{name}"], size, [to], dim=None)

        embedding = Embedding(build, f"{root}.embed_tokens", vocab_size, embedding_size)
        project_in = projection("project_in", embedding_size, h)
        project_out = projection("project_out", h, embedding_size)
        is_normed = is_pre_norm and not fields.flag("_remove_final_layer_norm", False)
        final_norm = norm(f"{root}.final_layer_norm") if is_normed else None

        def embed(token_ids: Tensor) -> Tensor:
            x = embedding(token_ids)
            return x if project_in is None else project_in(x)

        def finish(x: Tensor) -> Tensor:
            x = x if final_norm is None else final_norm(x)
            return x if project_out is None else project_out(x)

        tied = embedding if fields.flag("tie_word_embeddings", True) else None
        num_positions = fields.size("max_position_embeddings")
        super().__init__(
            vocab_size,
            embedding=embed,
            positions=LearnedPositions(
                build, f"{root}.embed_positions", num_positions, h, offset=2
            ),
            layers=[layer(f"{root}.layers.{i}") for i in range(fields.num_layers())],
            norm=finish,
            head=Head(build, "lm_head", vocab_size, embedding_size, tied),
        )
