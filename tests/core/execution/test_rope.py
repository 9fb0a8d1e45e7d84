"""Rotary tables are those of transformers; settings that make no sense are named."""

import pytest
import torch

from pagedcore.errors import ModelError
from pagedcore.execution.rope import make_rope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 16 for i in range(16)],
    "long_factor": [2 + i for i in range(16)],
    "original_max_position_embeddings": 64,
}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": LONGROPE,
    "longrope with its own factor": LONGROPE | {"factor": 16.0},
    "longrope with an amplitude": LONGROPE | {"attention_factor": 1.25},
    "yarn": YARN,
    "yarn with its own bounds": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn with an amplitude": YARN | {"attention_factor": 1.25},
    "yarn with DeepSeek's amplitude": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
}
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256}


def reference(scaling, num_positions, *, theta=10000.0, step_by_step=False):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": theta, **scaling})
    rotary = LlamaRotaryEmbedding(config)
    positions = torch.arange(num_positions)
    parts = positions.split(1) if step_by_step else [positions]
    tables = [rotary(torch.zeros(1), part[None]) for part in parts]
    half = config.head_dim // 2
    cos, sin = (torch.cat([table[i][0, :, :half] for table in tables]) for i in (0, 1))
    return torch.cat([cos, sin], 1)


def table(config, *, max_positions=256, head_dim=32):
    rope = make_rope(
        SIZES | config,
        head_dim=head_dim,
        max_positions=max_positions,
        device=torch.device("cpu"),
    )
    assert not rope.interleaved
    return rope.cos_sin


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)  # angles are up to 256
    return True


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=[n.split("'")[0] for n in SCALINGS])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_a_table_is_that_of_transformers(scaling, theta):
    expected = reference(scaling, 256, theta=theta)
    assert close(table({"rope_parameters": {"rope_theta": theta, **scaling}}), expected)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=[n.split("'")[0] for n in SCALINGS])
def test_the_spelling_before_transformers_5_means_the_same(scaling, key):
    old = {key: scaling["rope_type"], **scaling}
    if key == "type":
        del old["rope_type"]
    config = {"rope_theta": 500000.0, "rope_scaling": old}
    assert close(table(config), reference(scaling, 256, theta=500000.0))


def test_no_settings_are_the_default():
    assert close(table({"rope_scaling": None}), reference(SCALINGS["default"], 256))


def test_a_dynamic_base_grows_with_the_position_beyond_what_was_trained():
    """As transformers does it, one token after the other; before, nothing changes."""
    ours = table({"rope_parameters": SCALINGS["dynamic"]}, max_positions=300)
    assert close(ours, reference(SCALINGS["dynamic"], 300, step_by_step=True))
    assert close(ours[:256], reference(SCALINGS["default"], 256))
    assert (ours[256:] - reference(SCALINGS["default"], 300)[256:]).abs().max() > 0.1


def test_the_length_of_a_table_chooses_between_short_and_long_factors():
    """Up to the trained length the short ones hold; beyond, the long ones do from position 0 on."""
    ours = table({"rope_parameters": LONGROPE}, max_positions=64)
    assert close(ours, reference(LONGROPE, 64))
    longer = table({"rope_parameters": LONGROPE}, max_positions=65)
    assert close(longer, reference(LONGROPE, 65))
    assert (longer[:64] - ours).abs().max() > 0.1


def test_a_longrope_that_makes_nothing_longer_has_no_amplitude():
    config = {"rope_scaling": LONGROPE | {"factor": 1.0}}
    assert table(config)[0].tolist() == [1.0] * 16 + [0.0] * 16


def test_su_is_the_old_name_of_longrope():
    config = {"rope_scaling": LONGROPE | {"rope_type": "su"}}
    assert torch.equal(table(config), table({"rope_scaling": LONGROPE}))


@pytest.mark.parametrize("kind", ["llama3", "yarn", "longrope"])
def test_the_trained_length_may_stand_beside_the_scaling(kind):
    scaling = dict(SCALINGS[kind])
    del scaling["original_max_position_embeddings"]
    config = {"rope_scaling": scaling, "original_max_position_embeddings": 64}
    assert close(table(config), reference(SCALINGS[kind], 256))


def test_a_part_of_a_head_may_turn():
    assert table({"partial_rotary_factor": 0.25}).shape == (256, 8)
    assert table({"rope_parameters": {"partial_rotary_factor": 0.5}}).shape == (256, 16)


def test_on_meta_a_table_is_only_a_shape():
    rope = make_rope(
        SIZES | {"rope_parameters": SCALINGS["dynamic"]},
        head_dim=32,
        max_positions=2**24,
        device=torch.device("meta"),
    )
    assert rope.cos_sin.shape == (2**24, 32)


def test_more_positions_than_float32_can_tell_apart_are_refused():
    with pytest.raises(ModelError, match=r"max_position_embeddings must be at most 16777216"):
        table({"max_position_embeddings": 10**9}, max_positions=10**9)


@pytest.mark.parametrize(
    ("config", "field", "allowed"),
    [
        ({"rope_scaling": {"type": "twisted"}}, "rope_scaling.type", "default, linear"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.short_factor", "list of 16"),
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 15}},
            "rope_scaling.long_factor",
            "list of 16 positive numbers",
        ),
        (
            {"rope_scaling": LONGROPE | {"short_factor": [0] * 16}},
            "rope_scaling.short_factor",
            "list of 16 positive numbers",
        ),
        ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type", "yarn"),
        ({"rope_parameters": []}, "rope_parameters", "an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "a positive number"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "rope_scaling.factor",
            "a positive number",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": "2"}},
            "rope_scaling.factor",
            "a positive number",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1}},
            "rope_scaling.high_freq_factor",
            "a positive number",
        ),
        (
            {"rope_scaling": SCALINGS["llama3"] | {"high_freq_factor": 1}},
            "rope_scaling.high_freq_factor",
            "more than low_freq_factor",
        ),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "rope_scaling.original_max_position_embeddings",
            "whole number",
        ),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "rope_scaling.truncate", "true or false"),
        ({"rope_theta": -1}, "rope_theta", "a positive number"),
        ({"rope_theta": 1}, "rope_theta", "more than 1"),
        ({"rope_theta": float("nan")}, "rope_theta", "a positive number"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor", "even part of 32"),
        ({"partial_rotary_factor": 0.1}, "partial_rotary_factor", "even part of 32"),
    ],
)
def test_settings_that_make_no_sense_are_named(config, field, allowed):
    with pytest.raises(ModelError, match=r"^config.json: ") as error:
        table(config)
    assert f"{field} must" in str(error.value)
    assert allowed in str(error.value)
