"""The peak that a plan expects of the largest step is what the backend's kernels allocate."""

import json

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pagedcore import EngineConfig
from pagedcore.execution.batch import profile_batch
from pagedcore.execution.loading import build_executor
from pagedcore.execution.survey import parts_of, survey
from pagedcore.plugins import collect, load_plugins

NUM_TOKENS, NUM_SEQS = 32, 2
WIDE = {"hidden_size": 64, "intermediate_size": 256}


class Tracker(TorchDispatchMode):
    """Bytes of storages that operations made and that are still there, and their peak."""

    def __init__(self, known):
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self._live = {key: pair for key, pair in self._live.items() if not pair[0].expired()}
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                if storage._cdata not in self._known:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_the_largest_step_takes_what_a_plan_expects(architecture, tmp_path, device):
    if device == "cuda":
        pytest.skip("torch's allocator counts there: bench/plan.py compares with it")
    plugins = load_plugins()
    case = collect(plugins, "pagedcore_model_cases")[architecture]
    config = {**case.config, **WIDE, "architectures": [architecture], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = EngineConfig.from_options(
        load_format="dummy",
        dtype="bfloat16",
        device="cpu",
        backend="triton",
        cpu_kv_cache_gib=0.01,
        max_num_batched_tokens=NUM_TOKENS,
        max_num_seqs=NUM_SEQS,
    )
    found = survey(engine, tmp_path, plugins, on_gpu=True)
    executor = build_executor(engine, tmp_path, plugins, "serve")
    tables = torch.zeros(len(executor.groups), 1, 4, dtype=torch.int32)
    token_ids, batch = profile_batch(NUM_TOKENS, NUM_TOKENS, tables, torch.device("cpu"))
    executor._ops.begin_step(batch)
    roots = (executor._model, executor._caches, batch, token_ids)
    known = [part for root in roots for part in parts_of(root, skip=())]
    with (
        torch.inference_mode(),
        Tracker([part for part in known if isinstance(part, torch.Tensor)]) as tracker,
    ):
        executor._model.forward(token_ids, batch, executor._caches)
    expected = NUM_TOKENS * (2 * found.hidden_size + found.widest_step) * 2
    assert tracker.peak == pytest.approx(expected, rel=0.15)
    assert found.step_bytes(NUM_TOKENS, NUM_SEQS) >= expected
