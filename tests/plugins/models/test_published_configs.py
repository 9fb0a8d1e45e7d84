"""Published configurations are taken as they are: models of their shapes, without any weight."""

import pytest
import torch

import pagedcore_models
from pagedcore.execution.loading import longest_context
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.model_config import complete_config
from pagedcore.execution.quantizer import Unquantized
from pagedcore.execution.random_weights import RandomWeights
from pagedcore.execution.torch_ops import TorchOps

META = torch.device("meta")

FACTORS = {"short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)]}

PUBLISHED = {
    "Gemma 2 9B": (
        "Gemma2ForCausalLM",
        9.24,
        {
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
            "vocab_size": 256000,
        },
    ),
    "Gemma 3 1B": (
        "Gemma3ForCausalLM",
        1.0,
        {
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
    ),
    "Gemma 3 4B": (
        "Gemma3ForConditionalGeneration",
        3.88,
        {
            "mm_tokens_per_image": 256,
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
        },
    ),
    "Mixtral 8x7B": (
        "MixtralForCausalLM",
        46.7,
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        "Qwen2MoeForCausalLM",
        14.3,
        {
            "decoder_sparse_step": 1,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Phi-3-mini-128k": (
        "Phi3ForCausalLM",
        3.82,
        {
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"type": "longrope", **FACTORS},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
    ),
    "Phi-4-mini": (
        "Phi3ForCausalLM",
        3.84,
        {
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"type": "longrope", **FACTORS},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
    ),
    "Granite 3.3 8B": (
        "GraniteForCausalLM",
        8.17,
        {
            "attention_bias": False,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 12800,
            "logits_scaling": 16.0,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000000.0,
            "tie_word_embeddings": True,
            "vocab_size": 49159,
        },
    ),
    "OLMo 2 7B": (
        "Olmo2ForCausalLM",
        7.3,
        {
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
            "vocab_size": 100352,
        },
    ),
    "SmolLM3 3B": (
        "SmolLM3ForCausalLM",
        3.08,
        {
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 128256,
        },
    ),
    "Llama 3.2 1B": (
        "LlamaForCausalLM",
        1.24,
        {
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
    ),
}
"""By name: the architecture, billions of weights, and what config.json says."""


def build_on_meta(architecture, config, max_positions=None):
    """The model, its weights, and how long its context is."""
    model_class = pagedcore_models.pagedcore_models()[architecture]()
    config = complete_config(config, model_class)
    length = longest_context(config)
    weights = RandomWeights(torch.bfloat16, META, seed=0)
    build = ModelBuild(
        config=config,
        weights=weights,
        quantizer=Unquantized(),
        ops=TorchOps("cpu"),
        dtype=torch.bfloat16,
        device=META,
        max_positions=max_positions or length,
    )
    return model_class(build), weights, length


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_gives_a_model_of_its_size(name):
    architecture, billions, config = PUBLISHED[name]
    model, weights, length = build_on_meta(architecture, config)
    assert weights.num_bytes / 2e9 == pytest.approx(billions, rel=0.01)
    text = config.get("text_config", config)
    assert len(model.cache_specs) == text["num_hidden_layers"]
    assert length == text.get("max_position_embeddings", 131_072)


def test_a_window_that_no_sequence_leaves_is_none():
    """So layers with and without one share their blocks, and cached prefixes."""
    architecture, _, config = PUBLISHED["Gemma 2 9B"]
    windows = {
        length: {spec.window for spec in build_on_meta(architecture, config, length)[0].cache_specs}
        for length in (4096, 4097)
    }
    assert windows == {4096: {None}, 4097: {None, 4096}}


def test_layers_of_gemma_3_look_far_once_in_six():
    architecture, _, config = PUBLISHED["Gemma 3 1B"]
    model, _, _ = build_on_meta(architecture, config)
    windows = [spec.window for spec in model.cache_specs]
    assert windows[:6] == [512] * 5 + [None]
    assert windows.count(None) == 4
