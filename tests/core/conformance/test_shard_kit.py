"""Ranks as threads, and what the shard kit finds."""

import threading

import pytest
import torch

import pagedcore_models
from pagedcore.errors import ModelError, PluginError
from pagedcore.execution.layers import Attention
from pagedcore.execution.shard import Shard
from pagedcore.testing.rank_threads import run_ranks
from pagedcore.testing.shard_kit import check_shards, compare_shards, shard_of
from pagedcore.testing.tiny_models import save_tiny_model

MODELS = pagedcore_models.pagedcore_models()
CASES = pagedcore_models.pagedcore_model_cases()


def test_ranks_get_the_sum_and_the_row_of_what_they_gave():
    def work(shard):
        x = torch.full((2, 1), float(shard.rank + 1))
        total = shard.collective.all_reduce(x)
        x.zero_()  # it is this rank's again
        return total, shard.collective.all_gather(torch.full((2, 1), shard.rank), 1)

    for total, row in run_ranks(4, work):
        assert torch.equal(total, torch.full((2, 1), 10.0))
        assert torch.equal(row, torch.arange(4).expand(2, 4))


def test_an_error_of_one_rank_ends_all():
    def work(shard):
        if shard.rank == 1:
            raise ValueError("of rank 1")
        return shard.collective.all_reduce(torch.ones(1))

    with pytest.raises(ValueError, match="of rank 1"):
        run_ranks(3, work)


def test_a_rank_does_not_wait_for_ever():
    def work(shard):
        return shard.rank or shard.collective.all_reduce(torch.ones(1))

    with pytest.raises(threading.BrokenBarrierError):
        run_ranks(2, work, timeout_s=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [321, 323])
def test_a_vocabulary_need_not_be_a_multiple_of_the_ranks(vocab_size, tied, tmp_path):
    fields = {"vocab_size": vocab_size, "tie_word_embeddings": tied}
    save_tiny_model(tmp_path, "llama", **fields)
    assert compare_shards(tmp_path, MODELS["LlamaForCausalLM"]()).count("within") == 2


def test_a_model_says_between_how_many_ranks_it_cannot_be_divided(tmp_path):
    save_tiny_model(tmp_path, "llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    found = compare_shards(tmp_path, MODELS["LlamaForCausalLM"](), ranks=(2, 3))
    kv_heads = r"the kv heads of model.layers.0.self_attn, 3, cannot be divided between 2 ranks"
    assert found.startswith(f"not on 2 ranks: {kv_heads}: tensor_parallel_size must be one of 1, 3")
    assert "within" in found
    assert "on 3 ranks" in found


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "ModernBertModel"])
def test_a_class_that_cannot_be_divided_is_refused_by_name(architecture):
    model_class = MODELS[architecture]()
    with pytest.raises(ModelError, match=f"{architecture} cannot be divided: .* must be 1, not 2"):
        shard_of(model_class, Shard(0, 2))(None)


def test_a_model_that_adds_nothing_up_is_found(monkeypatch):
    run = Attention.__call__

    def add_rank_twice(self, x, batch, cache):
        out = run(self, x, batch, cache)
        return out + out * (self._num_heads < 4)

    monkeypatch.setattr(Attention, "__call__", add_rank_twice)
    with pytest.raises(PluginError, match="the logits of rank 0 of 2 differ"):
        check_shards("LlamaForCausalLM", MODELS["LlamaForCausalLM"], CASES["LlamaForCausalLM"], {})
