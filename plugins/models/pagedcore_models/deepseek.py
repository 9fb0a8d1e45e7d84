"""DeepSeek-V2 and V3: latent attention, and experts beside some that all tokens take."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from pagedcore.execution.config_fields import MAX_LAYERS, ConfigFields
from pagedcore.execution.expert_ops import Routing
from pagedcore.execution.latent_attention import LatentAttention
from pagedcore.execution.layers import DecoderLayer, FeedForward, GatedMLP
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.moe_layers import Mixture, SharedExperts
from pagedcore.execution.ops import RopeTable
from pagedcore.execution.rope import make_rope
from pagedcore_models.decoder import Decoder, DecoderSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSizes:
    """Fields about attention."""

    query_rank: int | None
    num_values: int
    unturned_dim: int
    turned_dim: int
    value_dim: int
    bias: bool

    @classmethod
    def read(cls, fields: ConfigFields) -> Self:
        """Raises ModelError, naming the field, for sizes that no such attention can have."""
        turned_dim = fields.size("qk_rope_head_dim")
        if turned_dim % 2:
            raise fields.error("qk_rope_head_dim", "must be even")
        has_rank = fields.has("q_lora_rank")
        bias = fields.flag("attention_bias", False)
        if bias and not has_rank:
            raise fields.error("attention_bias", "must be false without a q_lora_rank")
        return cls(
            query_rank=fields.size("q_lora_rank") if has_rank else None,
            num_values=fields.size("kv_lora_rank"),
            unturned_dim=fields.size("qk_nope_head_dim"),
            turned_dim=turned_dim,
            value_dim=fields.size("v_head_dim"),
            bias=bias,
        )

    def scale(self, fields: ConfigFields) -> float:
        """What scores are multiplied by; a stretched context makes them sharper."""
        scaling = fields.section("rope_parameters") or fields.section("rope_scaling")
        scale = float((self.unturned_dim + self.turned_dim) ** -0.5)
        if scaling is None or not scaling.values.get("mscale_all_dim"):
            return scale
        kind = scaling.values.get("rope_type", scaling.values.get("type", "default"))
        factor = 1.0 if kind == "default" else scaling.number("factor")
        sharper = 0.1 * scaling.number("mscale_all_dim") * math.log(factor) + 1
        return scale if factor <= 1 else scale * sharper * sharper


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSizes:
    """Fields about experts."""

    num_experts: int
    width: int
    num_shared: int
    first: int
    """Layers before the first mixture."""

    every: int
    routing: Routing


class DeepseekV2ForCausalLM(Decoder):
    """DeepSeek-V2, V2-Lite and V2.5, and the Coder models of this kind."""

    has_choice_bias: ClassVar[bool] = False

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`."""
        fields = ConfigFields(build.config)
        heads = LatentSizes.read(fields)
        sizes = DecoderSizes.read(build.config, head_dim=heads.turned_dim)
        mixture = self.read_mixture(fields)
        mlp_bias = fields.flag("mlp_bias", False)
        rope = make_rope(
            build.config,
            head_dim=heads.turned_dim,
            max_positions=build.max_positions,
            device=build.device,
        )
        rope = replace(rope, interleaved=fields.flag("rope_interleave", True))
        scale = heads.scale(fields)

        def attention(prefix: str, rope: RopeTable) -> LatentAttention:
            return LatentAttention(
                build,
                prefix,
                sizes.h,
                num_heads=sizes.num_heads,
                query_rank=heads.query_rank,
                num_values=heads.num_values,
                unturned_dim=heads.unturned_dim,
                value_dim=heads.value_dim,
                rope=rope,
                scale=scale,
                bias=heads.bias,
            )

        def feed_forward(prefix: str, index: int) -> FeedForward:
            if index < mixture.first or index % mixture.every:
                return GatedMLP(build, prefix, sizes.h, sizes.mlp_width, bias=mlp_bias)
            routed = self._mixture(build, prefix, sizes.h, mixture)
            if not mixture.num_shared:
                return routed
            width = mixture.width * mixture.num_shared
            shared = GatedMLP(build, f"{prefix}.shared_experts", sizes.h, width, bias=mlp_bias)
            return SharedExperts(routed, shared)

        def layer(prefix: str, index: int) -> DecoderLayer:
            mixer = attention(f"{prefix}.self_attn", rope)
            rest = feed_forward(f"{prefix}.mlp", index)
            return DecoderLayer(build, prefix, sizes.h, sizes.eps, mixer, rest)

        layers = [layer(f"model.layers.{i}", i) for i in range(sizes.num_layers)]
        for name in ("num_nextn_predict_layers", "num_mtp_layers"):  # they predict further tokens
            for i in range(fields.size(name, 0, least=0, most=MAX_LAYERS)):
                build.weights.ignore(f"model.layers.{sizes.num_layers + i}.")
        super().__init__(build, sizes, layers)

    @classmethod
    def read_mixture(cls, fields: ConfigFields) -> MixtureSizes:
        """Raises ModelError, naming the field, for sizes that no mixture can have."""
        fields.choice("scoring_func", ["softmax"], "softmax")
        method = fields.choice("topk_method", ["greedy", "group_limited_greedy"], "greedy")
        if fields.flag("norm_topk_prob", False):
            raise fields.error("norm_topk_prob", "must be false")
        return cls._sizes(
            fields,
            Routing(
                num_chosen=fields.size("num_experts_per_tok"),
                normalize=False,
                num_groups=fields.size("n_group", 1) if method != "greedy" else 1,
                num_groups_chosen=fields.size("topk_group", 1) if method != "greedy" else 1,
                scale=fields.number("routed_scaling_factor", 1.0),
            ),
        )

    @classmethod
    def _sizes(cls, fields: ConfigFields, routing: Routing) -> MixtureSizes:
        name = "n_routed_experts"
        if not fields.has(name):  # what transformers calls it, in its own models
            name = "num_experts" if fields.has("num_experts") else "num_local_experts"
        num_experts = fields.size(name)
        if num_experts % routing.num_groups:
            raise fields.error("n_group", f"must divide {name}, {num_experts}")
        if routing.num_groups_chosen > routing.num_groups:
            raise fields.error("topk_group", f"must be at most n_group, {routing.num_groups}")
        in_group = num_experts // routing.num_groups
        if in_group < routing.group_terms and routing.num_groups > 1:
            raise fields.error("n_group", f"must leave a group {routing.group_terms} experts")
        if routing.num_chosen > in_group * routing.num_groups_chosen:
            most = in_group * routing.num_groups_chosen
            raise fields.error("num_experts_per_tok", f"must be at most {most} by the other fields")
        return MixtureSizes(
            num_experts=num_experts,
            width=fields.size("moe_intermediate_size"),
            num_shared=fields.size("n_shared_experts", 0, least=0),
            first=fields.size("first_k_dense_replace", 0, least=0),
            every=fields.size("moe_layer_freq", 1),
            routing=routing,
        )

    def _mixture(self, build: ModelBuild, prefix: str, h: int, sizes: MixtureSizes) -> Mixture:
        weights, gate, bias = build.weights, f"{prefix}.gate", None
        router: Tensor = weights.take(f"{gate}.weight", (sizes.num_experts, h), dtype=torch.float32)
        if self.has_choice_bias:
            name = f"{gate}.e_score_correction_bias"
            bias = weights.take(name, (sizes.num_experts,), dtype=torch.float32)
        experts = build.quantizer.experts(
            weights, build.ops, f"{prefix}.experts", sizes.num_experts, h, sizes.width
        )
        return Mixture(build, sizes.routing, router, experts, choice_bias=bias)


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek-V3, V3.1 and R1, Kimi K2, Moonlight."""

    has_choice_bias: ClassVar[bool] = True

    @classmethod
    def read_mixture(cls, fields: ConfigFields) -> MixtureSizes:
        """See `DeepseekV2ForCausalLM.read_mixture`."""
        fields.choice("scoring_func", ["sigmoid"], "sigmoid")
        fields.choice("topk_method", ["noaux_tc"], "noaux_tc")
        return cls._sizes(
            fields,
            Routing(
                num_chosen=fields.size("num_experts_per_tok"),
                normalize=fields.flag("norm_topk_prob", True),
                sigmoid=True,
                num_groups=fields.size("n_group", 1),
                num_groups_chosen=fields.size("topk_group", 1),
                group_terms=2,
                scale=fields.number("routed_scaling_factor", 1.0),
            ),
        )
