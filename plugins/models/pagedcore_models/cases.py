"""Each architecture at a size that the model kit checks in seconds; docs/models.md lists them."""

from pagedcore.testing.model_case import SIZES, ModelCase

MIXTURE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True)

NO_PAD = dict(pad_token_id=None)
"""For families whose padding token is not in a vocabulary so small."""

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
    "CohereForCausalLM": ModelCase(
        family="Cohere Command R, Aya",
        config={**SIZES, "model_type": "cohere", "tie_word_embeddings": True},
        variants={
            "norms on heads": {"use_qk_norm": True},
            "biases": {"attention_bias": True, "tie_word_embeddings": False},
        },
        notes="attention and MLP in parallel",
    ),
    "Cohere2ForCausalLM": ModelCase(
        family="Cohere Command R7B, Command A",
        config={
            **SIZES,
            "model_type": "cohere2",
            "tie_word_embeddings": True,
            "num_hidden_layers": 5,
            "sliding_window": 8,
        },
        variants={
            "layer types": {
                "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
            },
        },
        notes="blocks that a window has left are freed",
    ),
    "GlmForCausalLM": ModelCase(
        family="GLM-4-9B (2024)",
        config={**SIZES, "model_type": "glm", "head_dim": 16, **NO_PAD},
        variants={"no biases": {"attention_bias": False}},
    ),
    "Glm4ForCausalLM": ModelCase(
        family="GLM-4-0414, GLM-Z1",
        config={**SIZES, "model_type": "glm4", "head_dim": 16, **NO_PAD},
        variants={"biases": {"attention_bias": True, "partial_rotary_factor": 0.25}},
    ),
    "Starcoder2ForCausalLM": ModelCase(
        family="StarCoder2",
        config={**SIZES, "model_type": "starcoder2", "sliding_window": 8},
        variants={
            "no window": {"sliding_window": None, "tie_word_embeddings": True},
            "no biases": {"use_bias": False, "hidden_act": "gelu"},
        },
    ),
    "GPT2LMHeadModel": ModelCase(
        family="GPT-2, DistilGPT-2",
        config={**SIZES, "model_type": "gpt2", "tie_word_embeddings": True},
        variants={
            "own width and head": {"n_inner": 96, "tie_word_embeddings": False},
            "other scales": {
                "scale_attn_by_inverse_layer_idx": True,
                "scale_attn_weights": False,
                "activation_function": "relu",
            },
        },
    ),
    "OPTForCausalLM": ModelCase(
        family="OPT, Galactica",
        config={**SIZES, "model_type": "opt", "ffn_dim": 96, "tie_word_embeddings": True},
        variants={
            "norms behind and a small embedding": {
                "do_layer_norm_before": False,
                "word_embed_proj_dim": 32,
            },
            "no biases": {
                "enable_bias": False,
                "layer_norm_elementwise_affine": False,
                "activation_function": "gelu",
                "tie_word_embeddings": False,
            },
        },
    ),
}
