"""Model folders through the whole engine: their tokens, and what is said of a broken one."""

import json
import shutil

import pytest
import torch

import pagedcore_models
from pagedcore import LLM, SamplingParams
from pagedcore.errors import ModelError, UnknownNameError
from pagedcore.testing.tiny_models import greedy_tokens, save_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

CASES = pagedcore_models.pagedcore_model_cases()
KINDS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
GENERATING = [name for name, case in CASES.items() if case.reference in KINDS]


def engine(folder, **options):
    settings = {"dtype": "float32", "num_gpu_blocks_override": 100, "device": "cpu"}
    return LLM(str(folder), **settings | options)


def tokens_of(llm, prompts):
    outputs = llm.generate(prompts, GREEDY, progress=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("architecture", GENERATING)
def test_tokens_are_those_of_transformers(architecture, tmp_path, prompts):
    """All prompts at once, in chunks of few tokens, so that prefill and decode share steps."""
    case = CASES[architecture]
    reference = save_tiny_model(tmp_path, case.config, reference=case.reference)
    llm = engine(tmp_path, max_num_batched_tokens=16, max_num_seqs=4)
    expected = [greedy_tokens(reference, prompt, 24) for prompt in prompts]
    assert tokens_of(llm, prompts) == expected
    assert tokens_of(llm, prompts) == expected  # and with a warm prefix cache


def test_a_model_runs_in_the_type_that_it_was_saved_in(tmp_path, prompts):
    save_tiny_model(tmp_path, dtype=torch.bfloat16)
    llm = engine(tmp_path, dtype="auto")
    assert [len(tokens) for tokens in tokens_of(llm, prompts)] == [24] * 4


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_config_alone_is_enough_for_random_weights(family, tmp_path, prompts):
    save_tiny_model(tmp_path, family)
    (tmp_path / "model.safetensors").unlink()
    first = tokens_of(engine(tmp_path, load_format="dummy"), prompts)
    assert first == tokens_of(engine(tmp_path, load_format="dummy"), prompts)
    assert first != tokens_of(engine(tmp_path, load_format="dummy", seed=1), prompts)


def test_every_architecture_that_is_offered_has_a_class_of_its_name():
    offered = dict(pagedcore_models.pagedcore_models())
    assert offered.pop("*")
    assert [load().__name__ for load in offered.values()] == list(offered)


CHECKED = ["Gemma2", "Gemma3", "Granite", "Mixtral", "Phi3", "Qwen2Moe", "SmolLM3", "Olmo2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_tiny_model(folder, "llama")
    save_tiny_model(folder / "qwen3", "qwen3", num_hidden_layers=2)
    save_tiny_model(folder / "qwen3_moe", "qwen3_moe", num_hidden_layers=2)
    for family in CHECKED:
        save_tiny_model(folder / family, CASES[f"{family}ForCausalLM"].config)
    return folder


@pytest.fixture
def lying(saved, tmp_path):
    """A folder whose config.json has other values than the one its weights were saved with."""

    def lying(family="", **values):
        folder = tmp_path / "lying"
        shutil.copytree(saved / family, folder)
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | values
        path.write_text(json.dumps(config), encoding="utf-8")
        return folder

    return lying


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("", {"hidden_size": 128}, "must have the shape [64, 128]"),
        (
            "",
            {"hidden_size": 63, "head_dim": None},
            "hidden_size must be a multiple of the 4 heads, not 63",
        ),
        ("", {"hidden_size": "64"}, "hidden_size must be a whole number"),
        ("", {"hidden_size": True}, "hidden_size must be a whole number"),
        ("", {"hidden_size": None}, "hidden_size must be a whole number"),
        ("", {"hidden_size": -64}, "hidden_size must be a whole number from 1"),
        ("", {"hidden_size": 10**12}, "hidden_size must be a whole number from 1 to 2147483647"),
        ("", {"intermediate_size": 2**31 - 1}, "must have the shape [2147483647, 64]"),
        ("", {"vocab_size": 10**9}, "'model.embed_tokens.weight' must have the shape [1000000000,"),
        ("", {"num_hidden_layers": 10**4}, "lacks tensors that its config.json asks for"),
        ("", {"num_hidden_layers": 10**9}, "must be a whole number from 1 to 65536"),
        ("", {"num_hidden_layers": 2}, "9 tensors that the model of its config.json does not use"),
        ("", {"num_key_value_heads": 3}, "num_key_value_heads must divide the 4 heads, not 3"),
        ("", {"head_dim": 15}, "head_dim must be even"),
        ("", {"head_dim": 32}, "'model.layers.0.self_attn.q_proj.weight' must have the shape"),
        ("", {"hidden_act": "gelu"}, "hidden_act must be one of silu, not 'gelu'"),
        ("", {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ("", {"attention_bias": True}, "asks for: 'model.layers.0.self_attn.q_proj.bias'"),
        ("", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        (
            "",
            {"rope_parameters": {"rope_type": "new"}},
            "rope_parameters.rope_type must be one of",
        ),
        ("", {"max_position_embeddings": 10**12}, "max_position_embeddings must be at most"),
        ("", {"dtype": "int4"}, "dtype must be one of"),
        ("", {"architectures": ["Qwen2ForCausalLM"]}, "self_attn.q_proj.bias"),
        ("qwen3", {"architectures": ["LlamaForCausalLM"]}, "does not use: "),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
            "layer_types must list one of sliding_attention, full_attention for each layer",
        ),
        ("qwen3_moe", {"num_local_experts": 7}, "mlp.gate.weight' must have the shape [7, 64]"),
        ("qwen3_moe", {"num_local_experts": 5}, "mlp.gate.weight' must have the shape [5, 64]"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "at most num_local_experts, 6, not 7"),
        ("qwen3_moe", {"moe_intermediate_size": 32}, "must have the shape [32, 64]"),
        ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers must be a list of whole numbers"),
        (
            "Gemma2",
            {"hidden_activation": "relu"},
            "hidden_activation must be one of gelu_pytorch_tanh, gelu, gelu_new, silu, not 'relu'",
        ),
        ("Gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping must be a positive"),
        ("Gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping must be a positive"),
        ("Gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar must be a positive"),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be"),
        ("Gemma2", {"layer_types": ["sliding_attention"]}, "layer_types must list one of"),
        ("Gemma2", {"sliding_window": -4}, "sliding_window must be a whole number"),
        ("Gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("Gemma3", {"rope_parameters": None, "rope_local_base_freq": 0}, "rope_local_base_freq"),
        (
            "Gemma3",
            {"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
            "rope_parameters.factor must be a positive number",
        ),
        ("Granite", {"residual_multiplier": 0}, "residual_multiplier must be a positive number"),
        ("Granite", {"logits_scaling": None, "embedding_multiplier": "x"}, "embedding_multiplier"),
        ("Granite", {"hidden_act": "relu2"}, "hidden_act must be one of silu, gelu, gelu_pytorch_"),
        ("Mixtral", {"num_local_experts": None}, "num_experts must be a whole number"),
        ("Mixtral", {"num_local_experts": 7}, "gate.weight' must have the shape [7, 64]"),
        ("Mixtral", {"num_experts_per_tok": 9}, "must be at most num_local_experts, 6, not 9"),
        ("Mixtral", {"intermediate_size": 64}, "experts.0.w1.weight' must have the shape [64, 64]"),
        ("Mixtral", {"hidden_act": "gelu"}, "hidden_act must be one of silu, not 'gelu'"),
        ("Phi3", {"num_key_value_heads": 4}, "qkv_proj.weight' must have the shape [192, 64]"),
        ("Phi3", {"intermediate_size": 64}, "gate_up_proj.weight' must have the shape [128, 64]"),
        ("Phi3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.short_factor"),
        ("Qwen2Moe", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
        ("Qwen2Moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers must hold 0 or 1 for each of 5"),
        ("SmolLM3", {"no_rope_layers": [1, 0, 2, 1, 1]}, "no_rope_layers must hold 0 or 1"),
        (
            "SmolLM3",
            {"no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval",
        ),
        ("Olmo2", {"num_key_value_heads": 1}, "k_norm.weight' must have the shape [16]"),
    ],
)
@pytest.mark.timeout(20)
def test_a_config_that_lies_is_found_out_and_named(lying, family, values, words):
    folder = lying(family, **values)
    with pytest.raises(ModelError) as error:
        engine(folder)
    assert words in str(error.value)


def test_weights_that_hold_nan_are_refused(lying):
    """IN-45"""
    from safetensors.torch import load_file, save_file

    folder = lying()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"NaN or infinity: 'model\.layers\.1\.mlp\.up_proj"):
        engine(folder)


def test_an_unknown_architecture_is_refused_with_those_installed(lying):
    with pytest.raises(UnknownNameError, match="did you mean 'LlamaForCausalLM'"):
        engine(lying(architectures=["LLamaForCausalLM"]))


def test_no_code_of_a_model_folder_runs(lying):
    """IN-44: `auto_map` is not even looked at."""
    folder = lying(auto_map={"AutoModelForCausalLM": "evil.Model"})
    evil = f"open({str(folder / 'was-here')!r}, 'w').close()\nclass Model: pass\n"
    (folder / "evil.py").write_text(evil, encoding="utf-8")
    engine(folder)
    assert not (folder / "was-here").exists()
