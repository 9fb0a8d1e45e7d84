"""Adapters in the layers of a model: what is called for them, and what graphs are known by."""

import torch

from pagedcore.execution.adapter_pool import AdaptedLinear, AdapterMatrices, AdapterPool
from pagedcore.execution.graphs import DecodeKey, DrawKind, drop_stale
from pagedcore.execution.lora_ops import AdapterStep
from pagedcore.execution.torch_ops import TorchOps


class CountingOps(TorchOps):
    """Counts the products with adapters."""

    def __init__(self):
        super().__init__("cpu")
        self.added = 0

    def add_lora(self, y, x, weights, step):
        self.added += 1
        super().add_lora(y, x, weights, step)


class Same:
    """A layer that changes nothing."""

    def apply(self, x):
        return x.clone()


def adapted_layer(pool, ops, name):
    weights = pool.make([name], 8, [8], torch.float32)
    return AdaptedLinear(Same(), ops, weights, pool)


def test_layers_that_no_adapter_changes_cost_nothing():
    pool, ops = AdapterPool(2, 4, torch.device("cpu")), CountingOps()
    changed, other = (adapted_layer(pool, ops, name) for name in ("a", "b"))
    pool.is_sealed = True
    matrices = {"a": AdapterMatrices(torch.ones(4, 8), torch.ones(8, 4))}
    pool.adapt(matrices)
    pool.place(0, "key", matrices)
    pool.step = AdapterStep(torch.zeros(3, dtype=torch.int32), 3)
    x = torch.randn(3, 8)
    assert torch.equal(other.apply(x), x)
    assert ops.added == 0
    assert not torch.equal(changed.apply(x), x)
    assert ops.added == 1


def test_the_number_of_adapted_layers_changes_with_the_set_alone():
    pool, ops = AdapterPool(2, 4, torch.device("cpu")), CountingOps()
    for name in ("a", "b", "c"):
        adapted_layer(pool, ops, name)
    numbers = [pool.adapted_layers]
    for names in (["a"], ["a"], ["a", "b"], ["b"], ["c"], ["a", "c"]):
        pool.adapt(names)
        numbers.append(pool.adapted_layers)
    assert numbers == [0, 1, 1, 2, 2, 3, 3]


def test_graphs_of_fewer_adapted_layers_are_dropped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    graphs = {
        DecodeKey(size, DrawKind.GREEDY, adapted): None for size in (1, 2) for adapted in range(3)
    }
    drop_stale(graphs, DecodeKey(4, DrawKind.GREEDY, 0))
    assert len(graphs) == 6
    drop_stale(graphs, DecodeKey(4, DrawKind.GREEDY, 2))
    assert sorted(key.adapted_layers for key in graphs) == [0, 0, 2, 2]
