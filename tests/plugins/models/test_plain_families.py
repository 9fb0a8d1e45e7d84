"""What Cohere, GLM-4, StarCoder2, GPT-2 and OPT do beyond what the model kit's cases show."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pagedcore_models
from pagedcore import LLM, SamplingParams
from pagedcore.errors import ModelError
from pagedcore.execution.checkpoint import read_config
from pagedcore.testing.tiny_models import greedy_tokens, save_tiny_model

CASES = pagedcore_models.pagedcore_model_cases()
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

FAMILIES = [
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
    "GlmForCausalLM",
    "Glm4ForCausalLM",
    "Starcoder2ForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
]

VARIANTS = [
    pytest.param(name, fields, id=f"{name}-{variant}".replace(" ", "-"))
    for name in FAMILIES
    for variant, fields in CASES[name].variants.items()
]


def change_config(folder, **values):
    """Replace fields of a config.json; None removes one."""
    config = read_config(folder) | values
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")


def rename_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {change(name): tensor for name, tensor in weights.items()}, folder / "model.safetensors"
    )


def engine(folder, **options):
    settings = {"dtype": "float32", "num_gpu_blocks_override": 100, "device": "cpu"}
    return LLM(str(folder), **settings | options)


def tokens_of(llm, prompts):
    outputs = llm.generate(prompts, GREEDY, progress=False)
    return [output.outputs[0].token_ids for output in outputs]


def is_close(paged, folder, reference, prompt):
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    return (paged(folder).step({0: prompt})[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "fields"), VARIANTS)
def test_tokens_of_variants_are_those_of_transformers(name, fields, tmp_path, prompts):
    """All prompts at once, in chunks of few tokens, so that prefill and decode share steps."""
    reference = save_tiny_model(tmp_path, CASES[name].config, **fields)
    llm = engine(tmp_path, max_num_batched_tokens=16, max_num_seqs=4)
    assert tokens_of(llm, prompts) == [greedy_tokens(reference, prompt, 24) for prompt in prompts]


def test_cohere_2_may_say_its_pattern_as_before_transformers_5(paged, prompts, tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    reference = save_tiny_model(tmp_path, CASES["Cohere2ForCausalLM"].config, layer_types=kinds)
    change_config(tmp_path, layer_types=None, sliding_window_pattern=2)
    assert is_close(paged, tmp_path, reference, prompts[0])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("CohereForCausalLM", {"tie_word_embeddings": None, "logit_scale": None}),
        ("Cohere2ForCausalLM", {"tie_word_embeddings": None, "layer_types": None}),
        ("GPT2LMHeadModel", {"tie_word_embeddings": None, "activation_function": None}),
        ("OPTForCausalLM", {"tie_word_embeddings": None, "word_embed_proj_dim": None}),
        ("GlmForCausalLM", {"attention_bias": None}),
    ],
)
def test_what_a_config_does_not_say_is_as_in_transformers(name, values, paged, prompts, tmp_path):
    reference = save_tiny_model(tmp_path, CASES[name].config)
    change_config(tmp_path, **values)
    assert is_close(paged, tmp_path, reference, prompts[0])


@pytest.mark.parametrize("fields", [{"rope_theta": 10000.0}, {"partial_rotary_factor": 0.25}])
def test_glm_4_may_say_its_rotation_beside_its_sizes(fields, paged, prompts, tmp_path):
    """Half of each head turns where nothing is said."""
    case = CASES["Glm4ForCausalLM"]
    reference = save_tiny_model(tmp_path, case.config, **fields)
    change_config(tmp_path, rope_parameters=None, **fields)
    assert is_close(paged, tmp_path, reference, prompts[0])


def test_the_oldest_files_of_gpt_2_have_masks_and_other_names(paged, prompts, tmp_path):
    reference = save_tiny_model(tmp_path, CASES["GPT2LMHeadModel"].config)
    rename_weights(tmp_path, lambda name: name.removeprefix("transformer."))
    weights = load_file(tmp_path / "model.safetensors")
    weights["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors")
    assert is_close(paged, tmp_path, reference, prompts[0])


def test_files_of_opt_may_begin_at_the_decoder(paged, prompts, tmp_path):
    reference = save_tiny_model(tmp_path, CASES["OPTForCausalLM"].config)
    rename_weights(tmp_path, lambda name: name.removeprefix("model."))
    assert is_close(paged, tmp_path, reference, prompts[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_can_be_rounded_to_8_bits_while_they_are_loaded(name, tmp_path, prompts):
    save_tiny_model(tmp_path, CASES[name].config)
    llm = engine(tmp_path, quantization="fp8")
    assert [len(tokens) for tokens in tokens_of(llm, prompts)] == [24] * 4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_alone_is_enough_for_random_weights(name, tmp_path, prompts):
    save_tiny_model(tmp_path, CASES[name].config)
    (tmp_path / "model.safetensors").unlink()
    first = tokens_of(engine(tmp_path, load_format="dummy"), prompts)
    assert first == tokens_of(engine(tmp_path, load_format="dummy"), prompts)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("CohereForCausalLM", {"logit_scale": 0}, "logit_scale must be a positive number"),
        ("CohereForCausalLM", {"use_qk_norm": True}, "asks for: 'model.layers.0.self_attn.q_norm"),
        ("Cohere2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types must list one of"),
        ("Cohere2ForCausalLM", {"sliding_window": 0}, "sliding_window must be a whole number"),
        (
            "GlmForCausalLM",
            {"rope_parameters": {"partial_rotary_factor": 0.1}},
            "must give an even part of 16",
        ),
        ("GlmForCausalLM", {"intermediate_size": 95}, "must have the shape [190, 64]"),
        ("Glm4ForCausalLM", {"architectures": ["GlmForCausalLM"]}, "does not use: "),
        ("Starcoder2ForCausalLM", {"hidden_act": "mish"}, "hidden_act must be one of"),
        ("Starcoder2ForCausalLM", {"use_bias": False}, "does not use: "),
        ("GPT2LMHeadModel", {"n_head": 3}, "n_embd must be a multiple of the 3 heads, not 64"),
        ("GPT2LMHeadModel", {"n_inner": 100}, "must have the shape [64, 100]"),
        ("GPT2LMHeadModel", {"n_positions": 128}, "wpe.weight' must have the shape [128, 64]"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention must be false"),
        ("OPTForCausalLM", {"ffn_dim": 128}, "must have the shape [128, 64]"),
        ("OPTForCausalLM", {"word_embed_proj_dim": 32}, "embed_tokens.weight' must have the shape"),
        ("OPTForCausalLM", {"max_position_embeddings": 10}, "must have the shape [12, 64]"),
    ],
)
@pytest.mark.timeout(60)
def test_a_config_that_lies_is_found_out_and_named(name, values, words, tmp_path):
    save_tiny_model(tmp_path, CASES[name].config)
    change_config(tmp_path, **values)
    with pytest.raises(ModelError) as error:
        engine(tmp_path)
    assert words in str(error.value)
