import warnings

import pytest

from pagedcore import EngineConfig
from pagedcore.config import DEPRECATED
from pagedcore.errors import ConfigError


def resolved(**options):
    facts = dict(usage="serve", device_memory_gib=None, max_model_len=2048, block_size=16)
    facts |= {name: options.pop(name) for name in list(options) if name in facts}
    is_a100 = options.pop("is_a100", False)
    return EngineConfig.from_options(**options).resolve(**facts, is_a100=is_a100)


def test_an_option_finds_its_section_by_name():
    config = EngineConfig.from_options(model="here", block_size=32, max_num_seqs=4, device="cpu")
    assert config.model.model == "here"
    assert config.cache.block_size == 32
    assert config.scheduler.max_num_seqs == 4
    assert config.execution.device == "cpu"


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'max_num_seq': did you mean 'max_num_seqs'"):
        EngineConfig.from_options(max_num_seq=4)


@pytest.mark.parametrize("name", sorted(DEPRECATED))
def test_a_name_of_the_past_warns_and_changes_nothing(name):  # LEG-1, LEG-2
    with pytest.warns(DeprecationWarning, match=f"{name} is deprecated") as caught:
        assert EngineConfig.from_options(**{name: 4}) == EngineConfig()
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("block_size", 24, "power of two"),
        ("block_size", 0, "power of two"),
        ("gpu_memory_utilization", 0.0, r"\(0, 1\]"),
        ("gpu_memory_utilization", 1.5, r"\(0, 1\]"),
        ("kv_watermark", 1.0, r"\[0, 1\)"),
        ("cpu_kv_cache_gib", -1, "positive"),
        ("max_num_seqs", 0, "at least 1"),
        ("max_num_batched_tokens", -5, "at least 1"),
        ("max_model_len", 0, "at least 1"),
        ("max_num_queued_reqs", -1, "negative"),
    ],
)
def test_a_value_out_of_range_says_what_is_allowed(option, value, allowed):
    with pytest.raises(ConfigError, match=f"{option}.*{allowed}"):
        EngineConfig.from_options(**{option: value})


@pytest.mark.parametrize(
    ("usage", "memory", "is_a100", "seqs", "budget"),
    [
        ("serve", None, False, 256, 2048),
        ("offline", None, False, 256, 8192),
        ("serve", 24.0, False, 256, 2048),
        ("serve", 80.0, False, 1024, 8192),
        ("offline", 80.0, False, 1024, 16384),
        ("serve", 80.0, True, 256, 2048),
        ("serve", 180.0, False, 1024, 16384),
    ],
)
def test_defaults_follow_the_device(usage, memory, is_a100, seqs, budget):  # CFG-2
    scheduler = resolved(usage=usage, device_memory_gib=memory, is_a100=is_a100).scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (seqs, budget)


def test_a_default_moves_and_an_explicit_value_never_does():  # CFG-3
    assert resolved(max_num_seqs=4096).scheduler.max_num_batched_tokens == 4096
    assert resolved(max_num_batched_tokens=64).scheduler.max_num_seqs == 64
    unchunked = resolved(enable_chunked_prefill=False, max_model_len=5000)
    assert unchunked.scheduler.max_num_batched_tokens == 5000


def test_contradicting_values_are_both_named():  # CFG-3
    with pytest.raises(ConfigError, match=r"64.*128"):
        resolved(max_num_batched_tokens=64, max_num_seqs=128)
    with pytest.raises(ConfigError, match=r"1024.*2048"):
        resolved(enable_chunked_prefill=False, max_num_batched_tokens=1024)


def test_resolving_leaves_nothing_open():
    config = resolved(block_size=8)
    assert config.cache.block_size == 8
    assert resolved().cache.block_size == 16
    assert config.model.max_model_len == 2048


def test_defaults_build_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EngineConfig()
