"""Each architecture at a size that the model kit checks in seconds; docs/models.md lists them."""

from pagedcore.testing.model_case import SIZES, ModelCase

MIXTURE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True)

CASES = {
    "LlamaForCausalLM": ModelCase(
        family="Llama 2, 3, 3.1 and 3.2 (text); SmolLM2",
        config={**SIZES, "model_type": "llama"},
        variants={"biases": {"attention_bias": True, "mlp_bias": True}},
    ),
    "MistralForCausalLM": ModelCase(
        family="Mistral",
        config={**SIZES, "model_type": "mistral", "sliding_window": 8},
        variants={"no window": {"sliding_window": None}},
        notes="blocks that a window has left are freed",
    ),
    "Qwen2ForCausalLM": ModelCase(
        family="Qwen2, Qwen2.5",
        config={**SIZES, "model_type": "qwen2"},
        variants={
            "windows above layer 0": {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            }
        },
    ),
    "Qwen3ForCausalLM": ModelCase(
        family="Qwen3",
        config={**SIZES, "model_type": "qwen3", "head_dim": 32},
    ),
    "Qwen3MoeForCausalLM": ModelCase(
        family="Qwen3-MoE",
        config={**SIZES, "model_type": "qwen3_moe", "head_dim": 32, **MIXTURE},
        variants={"weights that do not sum to 1": {"norm_topk_prob": False}},
    ),
}
