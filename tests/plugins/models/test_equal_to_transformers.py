"""Every family computes what transformers computes, in float32, over a paged cache."""

import pytest
import torch

from pagedcore.testing.tiny_models import greedy_tokens, save_tiny_model

ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}

VARIANTS = {
    "llama": ("llama", {}),
    "llama with linear rope": (
        "llama",
        {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "linear", "factor": 3.0}},
    ),
    "llama with dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama with the rope of Llama 3": (
        "llama",
        {
            "rope_parameters": ROPE
            | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
        },
    ),
    "qwen3 with yarn": (
        "qwen3",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0}},
    ),
    "llama with one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama with as many kv heads": ("llama", {"num_key_value_heads": 4}),
    "llama with wide heads": ("llama", {"head_dim": 24}),
    "llama with a tied head": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama in shards": ("llama", {"max_shard_size": "60KB"}),
    "mistral": ("mistral", {}),
    "mistral with a window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows above layer 0": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2 with a tied head": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "qwen3 with windows on some layers": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3 with a tied head": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe whose weights do not sum to 1": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe with a window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
    "qwen3_moe with some MLPs": (
        "qwen3_moe",
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
}


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """A folder, and the model in it as transformers runs it."""
    folder = tmp_path_factory.mktemp("model")
    family, fields = VARIANTS[request.param]
    return folder, save_tiny_model(folder, family, **fields)


@torch.inference_mode()
def reference_logits(model, prompt):
    return model(torch.tensor([prompt])).logits[0]


def close(logits, expected):
    assert (logits - expected).abs().max() < 1e-4
    return True


def test_logits_are_those_of_transformers(pair, paged, prompts):
    folder, reference = pair
    model = paged(folder)
    for row, prompt in enumerate(prompts):
        assert close(model.step({row: prompt})[row], reference_logits(reference, prompt))


def test_a_prompt_in_chunks_gives_the_same_logits(pair, paged, prompts):
    folder, reference = pair
    model = paged(folder)
    prompt = prompts[0]
    parts = [model.step({0: prompt[at : at + 7]})[0] for at in range(0, len(prompt), 7)]
    assert close(torch.cat(parts), reference_logits(reference, prompt))


def test_sequences_in_a_batch_do_not_see_each_other(pair, paged, prompts):
    """Prompts and single tokens mixed in the same steps."""
    folder, reference = pair
    model = paged(folder)
    expected = [reference_logits(reference, prompt) for prompt in prompts]
    first = model.step({0: prompts[0][:36], 1: prompts[1], 3: prompts[3][:9]})
    second = model.step({0: prompts[0][36:], 2: prompts[2], 3: prompts[3][9:]})
    assert close(torch.cat([first[0], second[0]]), expected[0])
    assert close(first[1], expected[1])
    assert close(second[2], expected[2])
    assert close(torch.cat([first[3], second[3]]), expected[3])


def test_greedy_tokens_are_those_of_transformers(pair, paged, prompts):
    folder, reference = pair
    for prompt in prompts[:2]:
        assert paged(folder).greedy(prompt, 24) == greedy_tokens(reference, prompt, 24)


def test_a_dynamic_base_grows_as_a_sequence_decodes(paged, prompts, tmp_path):
    """Beyond max_position_embeddings, 40 here, token by token as transformers does."""
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
    reference = save_tiny_model(tmp_path, max_position_embeddings=40, rope_parameters=rope)
    ours = paged(tmp_path, max_positions=80).greedy(prompts[0], 40)
    assert ours == greedy_tokens(reference, prompts[0], 40)
