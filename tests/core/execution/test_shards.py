"""What a rank has of a model: heads, widths, a vocabulary, in whatever pieces they are stored."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pagedcore.errors import ConfigError, ModelError
from pagedcore.execution.adapter_store import build_adapted
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.divided import DividedWeights, divided
from pagedcore.execution.random_weights import RandomWeights
from pagedcore.execution.renamed_weights import RenamedWeights
from pagedcore.execution.shard import Shard, Share
from pagedcore.lora_config import LoraConfig

CPU, META = torch.device("cpu"), torch.device("meta")


@given(count=st.integers(1, 50), size=st.integers(1, 12))
def test_ranks_have_everything_once(count, size):
    shares = [Shard(rank, size).longest(count) for rank in range(size)]
    own = [i for share in shares for part in share.ranges for i in part]
    assert own == list(range(count))
    assert max(share.own for share in shares) == shares[0].own == -(-count // size)


@given(
    num_kv_heads=st.integers(1, 8),
    group=st.integers(1, 4),
    size=st.integers(1, 32),
)
def test_a_rank_has_the_kv_heads_that_its_query_heads_read(num_kv_heads, group, size):
    num_heads = num_kv_heads * group
    for rank in range(size):
        try:
            query, key = Shard(rank, size).heads("x", num_heads, num_kv_heads)
        except ModelError:
            assert num_heads % size or (num_kv_heads % size and size % num_kv_heads)
            return
        (queries,), (keys,) = query.ranges, key.ranges
        assert {head // group for head in queries} == set(keys)
        each = query.own // key.own  # as attention maps them
        assert [keys[i // each] for i in range(query.own)] == [head // group for head in queries]


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), rank=st.integers(0, 1))
def test_parts_behind_each_other_are_divided_each_for_itself(sizes, rank):
    shares = [Shard(rank, 2).even("x", 8 * size) for size in sizes]
    joined = Share.join(shares)
    expected, begin = [], 0
    for share in shares:
        expected += [begin + i for part in share.ranges for i in part]
        begin += share.whole
    numbers = [i for piece in joined.pieces("x", joined.whole) for i in piece]
    words = [i for piece in joined.pieces("x", joined.whole // 4) for i in piece]
    assert numbers == expected
    assert words == [number // 4 for number in expected[::4]]


def test_what_cannot_be_divided_is_named_with_the_numbers_of_ranks_that_can():
    with pytest.raises(
        ModelError, match=r"the widths of a\.mlp, 6, .* 4 ranks.*one of 1, 2, 3, 6$"
    ):
        Shard(0, 4).even("the widths of a.mlp", 6)
    with pytest.raises(ModelError, match=r"the kv heads of a, 4, .* 6 ranks.* 1, 2, 4, 12$"):
        Shard(0, 6).heads("a", 12, 4)
    with pytest.raises(
        ModelError, match=r"'a\.scale' holds 96 .* pieces of 32,.* must be one of 1, 3$"
    ):
        Shard(0, 2).even("x", 96).pieces("a.scale", 3)
    with pytest.raises(ConfigError, match="from 0 to 1, not 2"):
        Shard(2, 2)


def test_a_single_rank_gets_the_build_as_it_is():
    build = object()
    assert divided(build, Shard(), object) is build


class TestWeights:
    @pytest.fixture
    def folder(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        tensors = {
            "a.weight": torch.randn(12, 8, generator=generator).bfloat16(),
            "a.bias": torch.randn(12, generator=generator),
            "codes": torch.randn(12, 8, generator=generator).to(torch.float8_e4m3fn),
        }
        (tmp_path / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("name", ["a.weight", "codes"])
    @pytest.mark.parametrize("kind", ["stored", "random"])
    def test_shares_are_those_of_the_whole(self, folder, kind, name, dim):
        def take(weights):
            dtype = torch.float8_e4m3fn if name == "codes" else None
            return weights.take(name, (12, 8), dtype=dtype, dim=dim).float()

        def open_weights():
            checkpoint = Checkpoint(folder)
            stored = checkpoint.tensors(torch.float32, CPU)
            return stored if kind == "stored" else RandomWeights(torch.float32, CPU, 7)

        parts = [take(DividedWeights(open_weights(), Shard(rank, 2))) for rank in range(2)]
        assert torch.equal(torch.cat(parts, dim), take(open_weights()))
        assert all(part.is_contiguous() for part in parts)

    def test_a_fused_tensor_is_read_where_its_parts_are(self, folder):
        share = Share.join([Shard(1, 2).even("x", 8), Shard(1, 2).even("x", 4)])
        checkpoint = Checkpoint(folder)
        shapes = DividedWeights(checkpoint.shapes(torch.float32), Shard(1, 2))
        shapes.divide("a", share)
        assert shapes.take("a.weight", (12, 8), dim=0).shape == (6, 8)
        weights = DividedWeights(checkpoint.tensors(torch.float32, CPU), Shard(1, 2))
        weights.divide("a", share)
        whole = checkpoint.tensors(torch.float32, CPU).take("a.weight", (12, 8))
        rows = [4, 5, 6, 7, 10, 11]
        assert torch.equal(weights.take("a.weight", (12, 8), dim=0), whole[rows])
        assert weights.take("a.bias", (12,), dim=0).shape == (6,)

    def test_numbers_of_others_are_not_looked_at(self, folder):
        tensors = {"a.weight": torch.tensor([1.0, torch.nan])}
        save_file(tensors, folder / "model.safetensors")
        for rank, is_refused in enumerate((False, True)):
            weights = Checkpoint(folder).tensors(torch.float32, CPU)
            DividedWeights(weights, Shard(rank, 2)).take("a.weight", (2,), dim=0)
            if is_refused:
                with pytest.raises(ModelError, match=r"'a\.weight'"):
                    weights.finish()
            else:
                weights.finish()

    def test_what_all_ranks_add_up_is_there_once(self, folder):
        taken = []
        for rank in range(2):
            weights = DividedWeights(Checkpoint(folder).tensors(torch.float32, CPU), Shard(rank, 2))
            weights.divide("a.bias", None)
            taken.append(weights.take("a.bias", (12,)))
        assert torch.equal(sum(taken), taken[0])
        assert not taken[1].any()

    def test_names_are_those_of_the_checkpoint(self, folder):
        weights = DividedWeights(Checkpoint(folder).shapes(torch.float32), Shard(0, 3))
        renamed = RenamedWeights(weights, {"w": "a"})
        renamed.divide("w", Shard(0, 3).all_of(12))
        assert renamed.take("w.weight", (12, 8), dim=0).shape == (12, 8)
        assert weights.take("codes", (12, 8), dtype=torch.float8_e4m3fn, dim=0).shape == (4, 8)

    def test_who_takes_a_divided_matrix_whole_is_stopped(self, folder):
        weights = DividedWeights(Checkpoint(folder).shapes(torch.float32), Shard(0, 2))
        weights.divide("a", Shard(0, 2).even("x", 12))
        with pytest.raises(ModelError, match=r"'a\.weight' .* takes it whole: .* must be 1"):
            weights.take("a.weight", (12, 8))


def test_adapters_are_for_a_single_rank():
    build = SimpleNamespace(shard=Shard(0, 2))
    with pytest.raises(ConfigError, match="enable_lora needs a tensor_parallel_size of 1"):
        build_adapted(object, build, LoraConfig(), is_decoder=True)
