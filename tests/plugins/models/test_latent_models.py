"""What DeepSeek's checkpoints hold beyond what transformers writes, and configs that lie."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore.errors import ModelError
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.quantizer import Unquantized
from pagedcore.execution.random_weights import RandomWeights
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.paged_model import PagedModel
from pagedcore.testing.tiny_models import save_tiny_model
from pagedcore_models.cases import CASES
from pagedcore_models.deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from pagedcore_models.gpt_oss import GptOssForCausalLM
from pagedcore_quantization.fp8 import Fp8

PROMPT = list(range(40, 62))
CLASSES = (DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, GptOssForCausalLM)


@torch.inference_mode()
def reference_logits(model):
    return model(torch.tensor([PROMPT])).logits[0]


def edit(folder, tensors=None, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    file = folder / "model.safetensors"
    save_file({**load_file(file), **(tensors or {})}, file, {"format": "pt"})


def test_a_bias_changes_which_experts_are_chosen_and_not_their_weights(tmp_path):
    reference = save_tiny_model(tmp_path, CASES["DeepseekV3ForCausalLM"].config)
    plain = reference_logits(reference)
    tensors = {}
    for index in (1, 2):
        name = f"model.layers.{index}.mlp.gate.e_score_correction_bias"
        tensors[name] = torch.linspace(-0.4, 0.4, 8)[[3, 0, 6, 1, 7, 2, 5, 4]]
        reference.get_buffer(name).copy_(tensors[name])
    edit(tmp_path, tensors)
    logits = PagedModel(tmp_path, DeepseekV3ForCausalLM).run(PROMPT)
    torch.testing.assert_close(logits, reference_logits(reference), atol=1e-4, rtol=1e-4)
    assert (logits - plain).abs().max() > 0.1


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    reference = save_tiny_model(tmp_path, CASES["DeepseekV3ForCausalLM"].config)
    more = {"model.layers.3.eh_proj.weight": torch.zeros(64, 128)}
    edit(tmp_path, more, num_nextn_predict_layers=1)
    logits = PagedModel(tmp_path, DeepseekV3ForCausalLM).run(PROMPT)
    torch.testing.assert_close(logits, reference_logits(reference), atol=1e-4, rtol=1e-4)
    edit(tmp_path, {"model.layers.4.eh_proj.weight": torch.zeros(64, 128)})
    with pytest.raises(ModelError, match="eh_proj"):
        PagedModel(tmp_path, DeepseekV3ForCausalLM)


def test_the_product_behind_the_latent_vector_may_be_stored_in_eight_bits(tmp_path):
    reference = save_tiny_model(tmp_path, CASES["DeepseekV2ForCausalLM"].config)
    logits = PagedModel(tmp_path, DeepseekV2ForCausalLM, quantizer=Fp8()).run(PROMPT)
    want = reference_logits(reference)
    assert 0 < (logits - want).norm() / want.norm() < 0.3


def build(model_class, **fields):
    config = {**CASES[model_class.__name__].config, **fields}
    meta = torch.device("meta")
    return model_class(
        ModelBuild(
            config=config,
            weights=RandomWeights(torch.float32, meta, 0),
            quantizer=Unquantized(),
            ops=TorchOps("cpu"),
            dtype=torch.float32,
            device=meta,
            max_positions=64,
        )
    )


@pytest.mark.parametrize(
    ("model_class", "fields", "words"),
    [
        (0, {"kv_lora_rank": None}, "kv_lora_rank must be a whole number"),
        (0, {"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
        (0, {"attention_bias": True}, "attention_bias must be false without a q_lora_rank"),
        (0, {"topk_method": "best"}, "topk_method must be one of greedy, group_limited_greedy"),
        (0, {"norm_topk_prob": True}, "norm_topk_prob must be false"),
        (0, {"num_experts_per_tok": 9}, "num_experts_per_tok must be at most 8"),
        (1, {"scoring_func": "softmax"}, "scoring_func must be one of sigmoid"),
        (1, {"n_group": 3}, "n_group must divide n_routed_experts, 8"),
        (1, {"n_group": 8, "num_experts_per_tok": 1}, "n_group must leave a group 2 experts"),
        (1, {"topk_group": 5}, "topk_group must be at most n_group, 4"),
        (1, {"num_experts_per_tok": 5}, "num_experts_per_tok must be at most 4"),
        (2, {"num_experts_per_tok": 7}, "num_experts_per_tok must be at most num_local_experts"),
        (2, {"layer_types": ["full"] * 3}, "layer_types must list one of"),
        (2, {"swiglu_limit": -1}, "swiglu_limit must be a positive number"),
    ],
)
def test_a_config_that_lies_is_found_out_and_named(model_class, fields, words):
    with pytest.raises(ModelError) as error:
        build(CLASSES[model_class], **fields)
    assert words in str(error.value)


@pytest.mark.parametrize("model_class", CLASSES)
def test_the_cache_of_a_layer_is_what_its_attention_needs(model_class):
    specs = build(model_class).cache_specs
    if model_class is GptOssForCausalLM:
        assert [spec.window for spec in specs] == [8, None, 8]
    else:
        assert [(spec.latent, spec.num_kv_heads, spec.head_dim) for spec in specs] == [
            (True, 1, 40)
        ] * 3
