"""How many blocks there are, and whether a sequence fits into them (MEM-1 to MEM-7)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagedcore.cache_spec import CacheSpec, group_layers
from pagedcore.config import CacheConfig
from pagedcore.errors import ConfigError
from pagedcore.execution import memory
from pagedcore.execution.kv_formats import as_is
from pagedcore.scheduling.blocks import BlockPool
from pagedcore.scheduling.paging import Pager

GIB = memory.GIB
SIXTEEN_BITS = as_is(torch.bfloat16).vector_bytes


def layers(*windows, heads=8, head_dim=128):
    specs = [CacheSpec(num_kv_heads=heads, head_dim=head_dim, window=w) for w in windows]
    return group_layers(specs)


def test_a_block_has_the_bytes_of_the_rules_example():
    """MEM-5: 32 layers, B=16, 8 heads of 128, 2 bytes: 2 MiB; 10 GiB are 5120 blocks."""
    block = memory.bytes_per_block(layers(*[None] * 32), 16, SIXTEEN_BITS)
    assert block == 2 * 2**20
    assert memory.count_blocks(CacheConfig(), 10 * GIB, block) == 5120
    assert memory.longest_that_fits(layers(None), 5120, 16, 8192) == 81_904


def test_layers_of_two_groups_share_memory():
    both = layers(None, 64, None, 64, 64)
    assert len(both) == 2
    alone = layers(64, 64, 64)
    assert memory.bytes_per_block(both, 16, SIXTEEN_BITS) == memory.bytes_per_block(
        alone, 16, SIXTEEN_BITS
    )


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ([None] * 28, [28]),
        ([4096, None] * 21, [21, 21]),  # Gemma 2
        (([1024] * 5 + [None]) * 10 + [1024] * 2, [8, 9, 9, 8, 9, 9, 10]),  # Gemma 3 27B
        (([4096] * 3 + [None]) * 8, [8, 8, 8, 8]),  # Command R7B
        ([64] + [None] * 20, [1, 20]),
        ([64] * 47 + [None], [5, 6, 6, 6, 6, 6, 6, 6, 1]),
        ([64] * 40 + [100] * 10, [10, 10, 10, 10, 10]),
    ],
)
def test_many_layers_that_forget_are_cut_to_the_size_of_those_that_do_not(pattern, sizes):
    """So that a block of those that do not, of which there are most in the end, is full."""
    groups = layers(*pattern)
    assert [len(group.layers) for group in groups] == sizes
    assert sorted(layer for group in groups for layer in group.layers) == [*range(len(pattern))]
    assert all(pattern[layer] == g.spec.window for g in groups for layer in g.layers)
    assert memory.bytes_per_block(groups, 16, SIXTEEN_BITS) == max(sizes) * memory.bytes_per_block(
        layers(None), 16, SIXTEEN_BITS
    )


def test_layers_of_another_shape_have_memory_of_their_own():
    specs = [CacheSpec(num_kv_heads=8, head_dim=64), CacheSpec(num_kv_heads=4, head_dim=64)]
    each = [memory.bytes_per_block(group_layers([spec]), 16, SIXTEEN_BITS) for spec in specs]
    assert memory.bytes_per_block(group_layers(specs), 16, SIXTEEN_BITS) == sum(each)


def test_the_start_fails_when_less_is_free_than_was_asked_for():
    assert memory.requested_bytes(80 * GIB, 79 * GIB, 0.5) == 40 * GIB
    with pytest.raises(ConfigError, match=r"72\.00 GiB of 80\.00 GiB, but only 10\.00 GiB"):
        memory.requested_bytes(80 * GIB, 10 * GIB, 0.9)


def test_weights_that_do_not_fit_are_refused_with_both_numbers():
    memory.check_weights_fit(5 * GIB, 5 * GIB)
    with pytest.raises(ConfigError, match=r"need 6\.00 GiB and 5\.00 GiB"):
        memory.check_weights_fit(6 * GIB, 5 * GIB)


def test_a_cache_that_does_not_fit_is_refused_with_both_sizes():
    memory.check_cache_fits(5 * GIB, 5 * GIB)
    with pytest.raises(ConfigError, match=r"6\.00 GiB was asked for and 5\.00 GiB"):
        memory.check_cache_fits(6 * GIB, 5 * GIB)


def test_explicit_amounts_replace_what_memory_would_give():
    """MEM-7"""
    block = 2**20
    assert memory.count_blocks(CacheConfig(kv_cache_memory_bytes=7 * block), GIB, block) == 7
    assert memory.count_blocks(CacheConfig(num_gpu_blocks_override=9), GIB, block) == 9


def test_a_sequence_that_does_not_fit_stops_the_start_with_the_largest_that_does():
    """MEM-6"""
    groups = layers(None)
    block = memory.bytes_per_block(groups, 16, SIXTEEN_BITS)
    assert memory.check_length(None, 4096, groups, 257, 16, block, 8192) == 4096
    with pytest.raises(ConfigError, match="largest max_model_len that fits is 4080"):
        memory.check_length(None, 4096, groups, 256, 16, block, 8192)
    assert memory.check_length(-1, 4096, groups, 256, 16, block, 8192) == 4080
    assert memory.check_length(-1, 2048, groups, 256, 16, block, 8192) == 2048
    assert memory.check_length(100, 4096, groups, 256, 16, block, 8192) == 100


def test_an_empty_pool_holds_nothing():
    with pytest.raises(ConfigError, match="largest max_model_len that fits is 0"):
        memory.check_length(-1, 4096, layers(None), 0, 16, 1, 8192)


@given(
    windows=st.lists(st.sampled_from([None, 1, 16, 100]), min_size=1, max_size=3),
    num_blocks=st.integers(0, 60),
    block_size=st.sampled_from([1, 4, 16]),
    budget=st.sampled_from([1, 16, 100, 2000]),
)
def test_the_largest_length_is_what_the_scheduler_takes(windows, num_blocks, block_size, budget):
    """MEM-6: no accepted request is too large for an empty pool, and none that fits is refused."""
    groups = layers(*windows)
    longest = memory.longest_that_fits(groups, num_blocks, block_size, budget)
    pager = Pager(BlockPool(2), None, groups, block_size)
    fits = [n for n in range(1, 1200) if pager.num_needed(n, min(n, budget)) <= num_blocks - 1]
    assert min(longest, 1199) == max(fits, default=0)
