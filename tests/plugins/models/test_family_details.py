"""What single families do beyond what the model kit's prompts show."""

import json

import pytest
import torch

import pagedcore_models
from pagedcore.execution.checkpoint import read_config
from pagedcore.execution.loading import longest_context
from pagedcore.execution.model_config import complete_config
from pagedcore.testing.tiny_models import greedy_tokens, save_tiny_model
from pagedcore_models.gemma3 import Gemma3ForConditionalGeneration
from pagedcore_quantization.fp8 import Fp8

CASES = pagedcore_models.pagedcore_model_cases()

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 13.0],
    "original_max_position_embeddings": 20,
}


@torch.inference_mode()
def logits_of(reference, prompt):
    return reference(torch.tensor([prompt])).logits[0]


def close(ours, expected):
    return (ours - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max())


def change_config(folder, **values):
    """Replace fields of a config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | values
    kept = {name: value for name, value in config.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def test_phi_has_factors_for_short_texts_and_for_long_ones(paged, prompts, tmp_path):
    """`max_model_len` chooses; transformers looks at each text's length."""
    reference = save_tiny_model(
        tmp_path,
        CASES["Phi3ForCausalLM"].config,
        rope_parameters=LONGROPE,
        original_max_position_embeddings=20,
    )
    long, *_, short = prompts
    assert len(short) < 20 < len(long)
    of_short, of_long = paged(tmp_path, max_positions=20), paged(tmp_path, max_positions=64)
    assert close(of_short.step({0: short})[0], logits_of(reference, short))
    assert close(of_long.step({0: long})[0], logits_of(reference, long))
    assert not close(of_long.step({1: short})[1], logits_of(reference, short))
    assert paged(tmp_path).greedy(long, 24) == greedy_tokens(reference, long, 24)


def test_gemma_3_may_be_described_as_before_transformers_5(paged, prompts, tmp_path):
    reference = save_tiny_model(
        tmp_path,
        CASES["Gemma3ForCausalLM"].config,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2
        + ["sliding_attention"],
    )
    change_config(
        tmp_path,
        rope_parameters=None,
        layer_types=None,
        rope_theta=5e5,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        rope_local_base_freq=2e4,
        sliding_window_pattern=3,
    )
    ours = paged(tmp_path).step({0: prompts[0]})[0]
    assert close(ours, logits_of(reference, prompts[0]))


def test_a_gemma_3_with_images_may_leave_out_what_is_usual_and_is_as_long_as_it_says(
    paged, prompts, tmp_path
):
    """As the published ones do, and they scale positions without making the context longer."""
    case = CASES["Gemma3ForConditionalGeneration"]
    usual = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=256, rope_theta=1e6)
    text = {**case.config["text_config"], **usual, "num_hidden_layers": 2}
    text["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    text["max_position_embeddings"] = 131_072
    reference = save_tiny_model(tmp_path, case.config, reference=case.reference, text_config=text)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["text_config"]
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    kept = {name: written[name] for name in (*names, "sliding_window", "query_pre_attn_scalar")}
    change_config(tmp_path, text_config={**kept, "rope_scaling": text["rope_scaling"]})
    ours = paged(tmp_path).step({0: prompts[0]})[0]
    assert close(ours, logits_of(reference, prompts[0]))
    config = complete_config(read_config(tmp_path), Gemma3ForConditionalGeneration)
    assert longest_context(config) == 131_072


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("Gemma2ForCausalLM", {"layer_types": None, "attention_bias": None}),
        ("SmolLM3ForCausalLM", {"layer_types": None, "no_rope_layers": None}),
        ("Qwen2MoeForCausalLM", {"layer_types": None, "mlp_only_layers": None, "qkv_bias": None}),
        ("GraniteForCausalLM", {"attention_bias": None, "mlp_bias": None, "hidden_act": None}),
    ],
)
def test_what_a_config_does_not_say_is_as_in_transformers(
    architecture, values, paged, prompts, tmp_path
):
    reference = save_tiny_model(tmp_path, CASES[architecture].config)
    change_config(tmp_path, **values)
    assert close(paged(tmp_path).step({0: prompts[0]})[0], logits_of(reference, prompts[0]))


def test_null_caps_nothing_while_a_gemma_2_that_says_nothing_is_capped(paged, prompts, tmp_path):
    reference = save_tiny_model(
        tmp_path, CASES["Gemma2ForCausalLM"].config, attn_logit_softcapping=50.0
    )
    change_config(tmp_path, attn_logit_softcapping=None, final_logit_softcapping=None)
    expected = logits_of(reference, prompts[0])
    assert close(paged(tmp_path).step({0: prompts[0]})[0], expected)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"final_logit_softcapping": None}
    path.write_text(json.dumps(config), encoding="utf-8")
    free = paged(tmp_path).step({0: prompts[0]})[0]
    assert not close(free, expected)
    assert close(30 * torch.tanh(free / 30), expected)


@pytest.mark.parametrize(
    ("architecture", "most"),
    [
        ("Phi3ForCausalLM", 0.2),
        ("MixtralForCausalLM", 0.25),  # experts are rounded, too, and some tokens choose another
    ],
)
def test_a_quantizer_finds_fused_and_renamed_weights(architecture, most, paged, prompts, tmp_path):
    """Rounded to 8 bits while they are loaded, they say about the same."""
    reference = save_tiny_model(tmp_path, CASES[architecture].config)
    model = paged(tmp_path, quantizer=Fp8())
    ours, expected = model.step({0: prompts[0]})[0], logits_of(reference, prompts[0])
    errors = (ours - expected).norm(dim=1) / expected.norm(dim=1)
    assert 1e-4 < errors.median() < most
