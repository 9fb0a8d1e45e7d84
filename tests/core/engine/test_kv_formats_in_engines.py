"""Engines whose cache keeps keys and values in 8 bits, or as a stranger's plugin says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pagedcore import EngineConfig, SamplingParams, hookimpl
from pagedcore.engine.build import build_engine
from pagedcore.errors import ConfigError
from pagedcore.execution.kv_formats import Int8, KVFormat
from pagedcore.execution.planning import plan_engine
from pagedcore.plugins import load_plugins
from pagedcore.request import Request
from pagedcore.testing import schedules
from pagedcore.testing.kv_format_kit import kv_format_checks
from pagedcore.testing.paged_model import PagedModel
from pagedcore_models.llama import LlamaForCausalLM

PROMPTS = [[7, *range(40, 40 + n)] for n in (1, 16, 30)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SETTINGS = {
    "chunks of 7": dict(max_num_batched_tokens=7, max_num_seqs=4),
    "blocks of 1": dict(block_size=1, num_gpu_blocks_override=1000),
    "preempted": dict(max_model_len=40, block_size=4, num_gpu_blocks_override=12),
}


def tokens_of(llm):
    outputs = llm.generate(PROMPTS, GREEDY, progress=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(tiny):
    with tiny.llm(kv_cache_dtype="int8") as llm:
        return tokens_of(llm)


@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_over_whole_numbers_are_the_same_however_they_are_run(tiny, expected, setting):
    with tiny.llm(kv_cache_dtype="int8", **SETTINGS[setting]) as llm:
        assert tokens_of(llm) == expected
        assert tokens_of(llm) == expected  # the prefix cache is warm now
        stats = llm.engine.stats()
        assert stats["prefix_cache_hits"] > 0
        assert (stats["num_preemptions"] > 0) == (setting == "preempted")


def test_forks_write_into_copies_of_a_block_with_its_scales(tiny):
    """FORK-2"""
    one = SamplingParams(temperature=0.9, max_tokens=6, ignore_eos=True, seed=5)
    with tiny.llm(kv_cache_dtype="int8") as llm:
        forked = llm.generate(PROMPTS[1:], replace(one, n=3), progress=False)
        assert llm.engine.stats()["fork_requests"] == 4
        for prompt, output in zip(PROMPTS[1:], forked, strict=True):
            seeded = [replace(one, seed=seed) for seed in (5, 6, 7)]
            alone = llm.generate([prompt] * 3, seeded, progress=False)
            want = [choice.outputs[0].token_ids for choice in alone]
            assert [choice.token_ids for choice in output.outputs] == want


def test_any_schedule_gives_the_same_logits_over_whole_numbers(tiny):
    """Up to a code that falls the other way; and near to what the model's own type gives."""
    prompts = schedules.make_prompts((8, 21), 320)
    model = PagedModel(tiny.folder, LlamaForCausalLM, kv_format=Int8())
    whole = torch.cat(schedules.whole(model, prompts))
    for run in (schedules.chunked, schedules.decoded, schedules.batched, schedules.cached):
        model.forget()
        got = torch.cat(run(model, prompts))
        assert (got - whole).norm() < 0.005 * whole.norm(), run.__name__
    exact = PagedModel(tiny.folder, LlamaForCausalLM)
    want = torch.cat(schedules.whole(exact, prompts))
    assert 1e-4 * want.norm() < (whole - want).norm() < 0.03 * want.norm()


class Int4(KVFormat):
    """Two numbers from -7 to 7 in a byte, and a scale in 16 bits."""

    name = "int4"
    dtype = torch.uint8
    scale_dtype = torch.bfloat16
    max_error = 0.15

    def num_codes(self, size):
        return size // 2

    def encode(self, x):
        wide = x.float()
        scale = (wide.abs().amax(-1) / 7).to(self.scale_dtype)
        whole = (wide / scale.float()[..., None]).nan_to_num(0.0, 0.0, 0.0).round().clamp(-7, 7)
        low, high = (whole + 8).to(torch.uint8).chunk(2, -1)
        return low + 16 * high, scale

    def decode(self, codes, scale, dtype):
        whole = torch.cat([codes % 16, codes // 16], -1).float() - 8
        return (whole * scale.float()[..., None]).to(dtype)


class Stranger:
    """A plugin with that format."""

    @hookimpl
    def pagedcore_kv_formats(self):
        return {"int4": lambda dtype: Int4()}


def plugins_with(stranger):
    plugins = load_plugins()
    plugins.register(stranger)
    return plugins


@pytest.mark.parametrize("check", list(kv_format_checks("int4", lambda _: Int4())), ids=str)
def test_a_strangers_format_keeps_its_promises(check):
    check()


def test_a_strangers_format_is_chosen_by_its_name_and_planned_with_its_bytes(tiny):
    plugins, sizes = plugins_with(Stranger()), {}
    for name in ("auto", "int8", "int4"):
        config = EngineConfig.from_options(
            model=str(tiny.folder), kv_cache_dtype=name, device="cpu", backend="torch",
            dtype="float32", cpu_kv_cache_gib=0.001, max_num_seqs=2,
        )  # fmt: skip
        engine = build_engine(config, plugins=plugins, folder=tiny.folder)
        ids = np.array(PROMPTS[2], np.int32)
        engine.add(Request(id=0, prompt_token_ids=ids, params=GREEDY))
        count = 0
        while engine.has_work:
            output = engine.step()
            count += 0 if output is None else len(output.tokens)
        assert count == GREEDY.max_tokens
        plan, _ = plan_engine(config, tiny.folder, plugins, gpu=None)
        assert plan.num_blocks == engine.info.num_blocks
        sizes[name] = plan.kv_bytes_per_token
        engine.shutdown()
    assert sizes["auto"] > 3 * sizes["int8"] > 4 * sizes["int4"]


def test_a_backend_without_kernels_for_a_format_says_so_at_the_start(tiny, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton_ops = pytest.importorskip("pagedcore_kernels.backend")
    monkeypatch.setattr(triton_ops, "_size_of", lambda device: (4, 1 << 17))
    config = EngineConfig.from_options(
        model=str(tiny.folder), kv_cache_dtype="int4", device="cpu", backend="triton"
    )
    words = r"'triton' has no kernels for .* 'int4': it has auto, fp8, int8\. .* backend='torch'"
    with pytest.raises(ConfigError, match=words):
        build_engine(config, plugins=plugins_with(Stranger()), folder=tiny.folder)
    with pytest.raises(ConfigError, match=words):
        plan_engine(config, tiny.folder, plugins_with(Stranger()), gpu=None)
