"""Each architecture at a size that the model kit checks in seconds; docs/models.md lists them."""

from pagedcore.testing.model_case import SIZES, ModelCase
from pagedcore_models.encoder_cases import ENCODERS

MIXTURE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True)

NO_PAD = dict(pad_token_id=None)
"""For families whose padding token is not in a vocabulary so small."""

GEMMA_3 = {
    **SIZES,
    "model_type": "gemma3_text",
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "num_hidden_layers": 7,
    "tie_word_embeddings": True,
}

LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 64,
    },
}

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
        family="Qwen3; Qwen3-Embedding",
        config={**SIZES, "model_type": "qwen3", "head_dim": 32},
        embeds=True,
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
    "Gemma2ForCausalLM": ModelCase(
        family="Gemma 2",
        config={
            **SIZES,
            "model_type": "gemma2",
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "tie_word_embeddings": True,
        },
        variants={
            "layer types and no caps": {
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
            },
            "biases and an exact GELU": {"attention_bias": True, "hidden_activation": "gelu"},
        },
        notes="blocks that a window has left are freed",
    ),
    "Gemma3ForCausalLM": ModelCase(
        family="Gemma 3 (text): 270M, 1B",
        config=GEMMA_3,
        variants={
            "scaled rope and a cap": {
                "layer_types": ["sliding_attention", "full_attention"],
                "num_hidden_layers": 2,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
                "final_logit_softcapping": 20.0,
            },
        },
        notes="blocks that a window has left are freed",
    ),
    "Gemma3ForConditionalGeneration": ModelCase(
        family="Gemma 3: 4B, 12B, 27B",
        config={
            "model_type": "gemma3",
            "vocab_size": SIZES["vocab_size"],
            "text_config": GEMMA_3,
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 300,
            "eoi_token_index": 301,
            "image_token_index": 302,
        },
        reference="AutoModelForImageTextToText",
        notes="texts only; blocks that a window has left are freed",
    ),
    "MixtralForCausalLM": ModelCase(
        family="Mixtral",
        config={**SIZES, "model_type": "mixtral", "num_local_experts": 6},
        variants={"a window": {"sliding_window": 8, "head_dim": 24}},
    ),
    "Qwen2MoeForCausalLM": ModelCase(
        family="Qwen1.5-MoE, Qwen2-MoE",
        config={
            **SIZES,
            "model_type": "qwen2_moe",
            **MIXTURE,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 80,
        },
        variants={
            "weights that sum to 1": {"norm_topk_prob": True, "qkv_bias": False},
            "some MLPs": {
                "num_hidden_layers": 4,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [3],
            },
        },
    ),
    "Phi3ForCausalLM": ModelCase(
        family="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        config={**SIZES, "model_type": "phi3", **NO_PAD},
        variants={
            "a window": {"sliding_window": 8},
            "a part that turns": {
                "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75},
                "tie_word_embeddings": True,
                "hidden_size": 128,
            },
        },
        notes="`max_model_len` chooses between rotary factors for short and for long texts",
    ),
    "GraniteForCausalLM": ModelCase(
        family="Granite 3",
        config={
            **SIZES,
            "model_type": "granite",
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.22,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
        variants={"biases": {"attention_bias": True, "mlp_bias": True}},
    ),
    "Olmo2ForCausalLM": ModelCase(
        family="OLMo 2",
        config={**SIZES, "model_type": "olmo2"},
        variants={"biases and one kv head": {"attention_bias": True, "num_key_value_heads": 1}},
    ),
    "GptOssForCausalLM": ModelCase(
        family="GPT-OSS",
        config={
            **SIZES,
            "model_type": "gpt_oss",
            "head_dim": 32,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
        variants={
            "layer types and no biases": {
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "attention_bias": False,
            },
        },
        notes="sinks; experts in MXFP4 stay packed; blocks that a window has left are freed",
    ),
    "DeepseekV2ForCausalLM": ModelCase(
        family="DeepSeek-V2, V2-Lite, V2.5",
        config={
            **LATENT,
            "model_type": "deepseek_v2",
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
        },
        variants={
            "groups of experts and a query's rank": {
                "q_lora_rank": 40,
                "attention_bias": True,
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
            },
        },
        notes="the cache holds one latent vector for each position",
    ),
    "DeepseekV3ForCausalLM": ModelCase(
        family="DeepSeek-V3, V3.1, R1; Kimi K2, Moonlight",
        config={
            **LATENT,
            "model_type": "deepseek_v3",
            "q_lora_rank": 40,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
        },
        variants={
            "one group and no scaling": {
                "q_lora_rank": None,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": False,
                "rope_interleave": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        notes="the cache holds one latent vector for each position; layers that predict further "
        "tokens are left out",
    ),
    "SmolLM3ForCausalLM": ModelCase(
        family="SmolLM3",
        config={**SIZES, "model_type": "smollm3", "num_hidden_layers": 5, **NO_PAD},
        variants={
            "other layers turn": {
                "no_rope_layers": [0, 1, 1, 0, 1],
                "use_sliding_window": True,
                "sliding_window": 8,
                "attention_bias": True,
                "mlp_bias": True,
            },
        },
    ),
    **ENCODERS,
}
