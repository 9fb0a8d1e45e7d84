"""A preset stands between what is given and the device's defaults."""

import pytest

from pagedcore import EngineConfig
from pagedcore.errors import ConfigError
from pagedcore.presets import PRESETS


def resolved(preset, **options):
    facts = dict(usage="serve", device_memory_gib=24.0, max_model_len=4096, block_size=16)
    facts |= {name: options.pop(name) for name in list(options) if name in facts}
    return EngineConfig.from_options(preset=preset, **options).resolve(**facts)


def settings(config):
    scheduler = config.scheduler
    return {
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
        "kv_watermark": config.cache.kv_watermark,
    }


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("gib", [None, 24.0, 80.0, 180.0])
def test_what_a_preset_sets_is_set_on_every_device(name, gib):
    config = resolved(name, device_memory_gib=gib)
    assert PRESETS[name].settings.items() <= settings(config).items()


@pytest.mark.parametrize("gib", [None, 24.0, 80.0, 180.0])
def test_the_general_preset_is_the_default_and_sets_nothing(gib):
    plain = EngineConfig().resolve(
        usage="serve", device_memory_gib=gib, max_model_len=4096, block_size=16
    )
    assert resolved("general", device_memory_gib=gib) == plain
    assert PRESETS["general"].settings == {}


@pytest.mark.parametrize(
    "given",
    [
        {"max_num_seqs": 7},
        {"max_num_batched_tokens": 4000},
        {"long_prefill_token_threshold": 0},
        {"kv_watermark": 0.0},
    ],
)
@pytest.mark.parametrize("name", PRESETS)
def test_what_is_given_wins_over_a_preset(name, given):
    assert given.items() <= settings(resolved(name, **given)).items()


def test_what_a_preset_sets_moves_where_a_given_value_needs_it_to():  # CFG-3
    assert resolved("low-latency", max_num_batched_tokens=32).scheduler.max_num_seqs == 32
    assert resolved("low-latency", max_num_seqs=4096).scheduler.max_num_batched_tokens == 4096
    whole = resolved("low-latency", max_model_len=8192, enable_chunked_prefill=False)
    assert whole.scheduler.max_num_batched_tokens == 8192


def test_presets_name_settings_that_there_are():
    for preset in PRESETS.values():
        EngineConfig.from_options(**preset.settings)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ConfigError, match="general, low-latency, high-throughput"):
        EngineConfig.from_options(preset="fast")
