"""Architectures that have no file here run through transformers' own code, or are refused."""

import json
import logging

import pytest
import torch

from pagedcore import LLM, SamplingParams
from pagedcore.errors import ModelError, UnknownNameError
from pagedcore.execution.checkpoint import read_config
from pagedcore.testing.model_case import SIZES
from pagedcore.testing.paged_model import PagedModel
from pagedcore.testing.tiny_models import greedy_tokens, save_tiny_model, write_tokenizer
from pagedcore_models.transformers_model import TransformersModel

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

OTHERS = {
    "biases and parallel parts": {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "windows on some layers": {
        "model_type": "olmo3",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": None,
    },
    "experts that are stored one by one": {
        "model_type": "olmoe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "pad_token_id": None,
    },
    "queries, keys and values in one matrix": {"model_type": "persimmon"},
    "a tied head": {"model_type": "arcee", "tie_word_embeddings": True},
    "values that are shorter than keys": {
        "model_type": "minicpm3",
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "sinks and windows": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 4,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "pad_token_id": None,
    },
}


def engine(folder, **options):
    settings = {"dtype": "float32", "num_gpu_blocks_override": 100, "device": "cpu"}
    return LLM(str(folder), **settings | options)


def tokens_of(llm, prompts):
    outputs = llm.generate(prompts, GREEDY, progress=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module", params=OTHERS, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """A folder, and the model in it as transformers runs it."""
    folder = tmp_path_factory.mktemp("model")
    return folder, save_tiny_model(folder, {**SIZES, **OTHERS[request.param]})


def test_tokens_are_those_of_transformers(pair, prompts):
    """All prompts at once, in chunks of few tokens, so that prefill and decode share steps."""
    folder, reference = pair
    few = {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    llm = engine(folder, model_impl="transformers", **few)
    expected = [greedy_tokens(reference, prompt, 24) for prompt in prompts]
    assert tokens_of(llm, prompts) == expected
    assert tokens_of(llm, prompts) == expected  # and with a warm prefix cache


def test_logits_are_those_of_transformers(pair, prompts):
    folder, reference = pair
    model = PagedModel(folder, TransformersModel)
    for row, prompt in enumerate(prompts):
        logits = model.run(prompt, row=row, chunk=7)
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        assert (logits - expected).abs().max() < 1e-4


def test_an_architecture_that_has_a_file_can_be_forced_through_transformers(tmp_path, prompts):
    save_tiny_model(tmp_path, "llama", tie_word_embeddings=True)
    native = tokens_of(engine(tmp_path), prompts)
    assert tokens_of(engine(tmp_path, model_impl="transformers"), prompts) == native


def test_one_line_says_that_it_is_slower(tmp_path, caplog):
    save_tiny_model(tmp_path, {**SIZES, "model_type": "gpt_neox"})
    with caplog.at_level(logging.WARNING):
        engine(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if "slower" in record.getMessage()]
    assert line.startswith("GPTNeoXForCausalLM runs through transformers' modeling code")


def test_no_step_of_it_is_captured():
    assert TransformersModel.supports_graphs is False


def test_a_config_alone_is_enough_for_random_weights(tmp_path, prompts):
    save_tiny_model(tmp_path, {**SIZES, "model_type": "gpt_neox", "tie_word_embeddings": True})
    (tmp_path / "model.safetensors").unlink()
    first = tokens_of(engine(tmp_path, load_format="dummy"), prompts)
    assert first == tokens_of(engine(tmp_path, load_format="dummy"), prompts)


def test_masks_and_frequencies_that_old_files_hold_are_no_leftovers(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path, {**SIZES, "model_type": "gpt_neox"})
    weights = load_file(tmp_path / "model.safetensors")
    weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    weights["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, tmp_path / "model.safetensors")
    engine(tmp_path)


@pytest.fixture
def config_only(tmp_path):
    """A folder with the config.json of a tiny model of transformers."""

    def config_only(**fields):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**{**SIZES, "pad_token_id": None, **fields})
        mapped = AutoModelForCausalLM._model_mapping[type(config)]
        config.architectures = [mapped.__name__]
        config.save_pretrained(tmp_path)
        write_tokenizer(tmp_path)
        return tmp_path

    return config_only


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mamba"}, "MambaForCausalLM cannot run through transformers"),
        ({"model_type": "bloom"}, "BloomForCausalLM cannot run .* attention cannot be replaced"),
        ({"model_type": "minimax"}, "MiniMaxForCausalLM .* layers of the type linear_attention"),
        (
            {
                "model_type": "gpt_neox",
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
            "GPTNeoXForCausalLM .* depends on the longest sequence of a batch",
        ),
        (
            {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]},
            "Lfm2ForCausalLM cannot run .* more of the past than keys and values",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_cannot_run_over_a_paged_cache_is_refused_by_name(config_only, fields, words):
    with pytest.raises(ModelError, match=words):
        engine(config_only(**fields), load_format="dummy")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1024"),
        ({"num_hidden_layers": 2}, "tensors that the model of its config.json does not use"),
        ({"num_hidden_layers": 4}, "lacks tensors that its config.json asks for"),
        ({"hidden_size": 128}, "must have the shape"),
        ({"hidden_size": "64"}, "transformers refuses it"),
    ],
)
@pytest.mark.timeout(60)
def test_a_config_that_lies_is_found_out(tmp_path, values, words):
    save_tiny_model(tmp_path, {**SIZES, "model_type": "gpt_neox"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**read_config(tmp_path), **values}), encoding="utf-8")
    with pytest.raises(ModelError, match=words):
        engine(tmp_path)


def test_its_weights_cannot_be_quantized(tmp_path):
    save_tiny_model(tmp_path, {**SIZES, "model_type": "gpt_neox"})
    with pytest.raises(ModelError, match="its weights cannot be quantized there"):
        engine(tmp_path, quantization="fp8")


def test_only_code_written_for_pagedcore_runs_where_that_is_asked_for(config_only):
    folder = config_only(model_type="gpt_neox")
    with pytest.raises(UnknownNameError, match="no model is named 'GPTNeoXForCausalLM'"):
        engine(folder, load_format="dummy", model_impl="pagedcore")


def test_an_architecture_that_transformers_does_not_have_cannot_be_forced(config_only):
    folder = config_only(model_type="gpt_neox")
    values = read_config(folder) | {"architectures": ["MineForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match="model_impl=transformers cannot run MineForCausalLM"):
        engine(folder, load_format="dummy", model_impl="transformers")


def test_no_code_of_a_model_folder_runs(config_only):
    """IN-44: `auto_map` is not even looked at, nor are kernels that a config.json names."""
    folder = config_only(model_type="gpt_neox")
    hostile = {
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "attn_implementation": "someone/kernel",
        "_attn_implementation_internal": "someone/kernel",
    }
    evil = f"open({str(folder / 'was-here')!r}, 'w').close()\nclass Model: pass\n"
    (folder / "evil.py").write_text(evil, encoding="utf-8")
    values = read_config(folder) | hostile
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    engine(folder, load_format="dummy")
    assert not (folder / "was-here").exists()
