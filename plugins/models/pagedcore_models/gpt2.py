"""GPT-2: learned positions, LayerNorms, a plain MLP, and matrices stored as [in, out]."""

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, Embedding, Head
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.plain_layers import (
    ACTIVATIONS,
    LayerNorm,
    LearnedPositions,
    PlainLayer,
    PlainMLP,
    transposed,
)
from pagedcore_models.plain_decoder import PlainDecoder


class GPT2LMHeadModel(PlainDecoder):
    """GPT-2 of all sizes, DistilGPT-2, and what is built like them."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        vocab_size, h = fields.size("vocab_size"), fields.size("n_embd")
        num_heads = fields.size("n_head")
        if h % num_heads:
            raise fields.error("n_embd", f"must be a multiple of the {num_heads} heads")
        width = fields.size("n_inner", 4 * h)
        eps = fields.number("layer_norm_epsilon", 1e-5)
        activation = fields.choice("activation_function", list(ACTIVATIONS), "gelu_new")
        is_scaled = fields.flag("scale_attn_weights", True)
        by_layer = fields.flag("scale_attn_by_inverse_layer_idx", False)
        if fields.flag("add_cross_attention", False):
            raise fields.error("add_cross_attention", "must be false: there is no encoder")
        root = "" if build.weights.has("wte.weight") else "transformer."  # both are in use
        matrices = transposed(build)

        def norm(name: str) -> LayerNorm:
            return LayerNorm(build, name, h, eps)

        def layer(prefix: str, index: int) -> PlainLayer:
            scale = (h // num_heads) ** -0.5 if is_scaled else 1.0
            attention = Attention(
                matrices,
                f"{prefix}.attn",
                h,
                num_heads=num_heads,
                num_kv_heads=num_heads,
                head_dim=h // num_heads,
                rope=None,
                qkv_bias=True,
                output_bias=True,
                scale=scale / (index + 1) if by_layer else scale,
                qkv_names=["c_attn"],
                output_name="c_proj",
            )
            names = [f"{prefix}.mlp.c_fc", f"{prefix}.mlp.c_proj"]
            mlp = PlainMLP(matrices, names, h, width, activation=activation)
            build.weights.ignore(f"{prefix}.attn.bias")  # old checkpoints hold the causal mask
            build.weights.ignore(f"{prefix}.attn.masked_bias")
            return PlainLayer(norm(f"{prefix}.ln_1"), attention, norm(f"{prefix}.ln_2"), mlp)

        embedding = Embedding(build, f"{root}wte", vocab_size, h)
        tied = embedding if fields.flag("tie_word_embeddings", True) else None
        super().__init__(
            vocab_size,
            embedding=embedding,
            positions=LearnedPositions(build, f"{root}wpe", fields.size("n_positions"), h),
            layers=[layer(f"{root}h.{i}", i) for i in range(fields.num_layers("n_layer"))],
            norm=norm(f"{root}ln_f"),
            head=Head(build, "lm_head", vocab_size, h, tied),
        )
