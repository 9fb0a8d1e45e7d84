"""Mixtral: a Mistral in which each token takes two of eight MLPs."""

from dataclasses import replace

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, DecoderLayer
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.moe_layers import SparseMoE
from pagedcore.execution.renamed_weights import RenamedWeights
from pagedcore_models.decoder import Decoder, DecoderSizes

EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""What the checkpoint calls the matrices of an expert."""


class MixtralForCausalLM(Decoder):
    """Mixtral 8x7B and 8x22B."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        sizes = DecoderSizes.read(build.config, eps=("rms_norm_eps", 1e-5))
        name = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
        num_experts = fields.size(name)
        num_chosen = fields.size("num_experts_per_tok", 2)
        if num_chosen > num_experts:
            raise fields.error("num_experts_per_tok", f"must be at most {name}, {num_experts}")
        window = fields.size("sliding_window") if fields.has("sliding_window") else None
        rope = sizes.rope(build, theta=1e6)
        renamed = replace(build, weights=RenamedWeights(build.weights, EXPERT_NAMES))

        def layer(prefix: str) -> DecoderLayer:
            attention = Attention(
                build,
                f"{prefix}.self_attn",
                sizes.h,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                rope=rope,
                window=window,
            )
            mixture = SparseMoE(
                renamed,
                f"{prefix}.block_sparse_moe",
                sizes.h,
                sizes.mlp_width,
                num_experts=num_experts,
                num_chosen=num_chosen,
                normalize=True,
            )
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, attention, mixture)

        layers = [layer(f"model.layers.{i}") for i in range(sizes.num_layers)]
        super().__init__(build, sizes, layers)
