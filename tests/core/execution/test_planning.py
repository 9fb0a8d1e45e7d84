"""A plan from config.json alone says what a start then allocates."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagedcore import EngineConfig, hookimpl
from pagedcore.errors import ConfigError, ModelError
from pagedcore.execution import memory
from pagedcore.execution.loading import build_executor
from pagedcore.execution.plan import Gpu
from pagedcore.execution.planning import plan_engine, share_out
from pagedcore.execution.survey import parts_of, storage_bytes, survey
from pagedcore.plugins import collect, load_plugins
from pagedcore.testing.written_formats import awq, bitsandbytes_4, float_blocks, gptq, whole_numbers

GIB = memory.GIB
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
PARAMETERS_8B = 8_030_261_248
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
"""What transformers' own class fills in, under its older names."""

PLUGINS = load_plugins()
CASES = collect(PLUGINS, "pagedcore_model_cases")


@pytest.fixture
def folder(tmp_path):
    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.fixture
def plan(folder):
    """A plan of Llama-3.1-8B, on a GPU of so many GiB."""

    def make(gib=24.0, *, usage="serve", is_a100=False, config=LLAMA_8B, **options):
        gpu = None if gib is None else Gpu(total_bytes=int(gib * GIB), is_a100=is_a100)
        engine = EngineConfig.from_options(**options)
        return plan_engine(engine, folder(config), PLUGINS, gpu=gpu, usage=usage)[0]

    return make


@pytest.fixture(scope="module")
def surveys(tmp_path_factory):
    """What is known of Llama-3.1-8B, by weight format."""
    path = tmp_path_factory.mktemp("8b")
    (path / "config.json").write_text(json.dumps(LLAMA_8B))
    engines = {name: EngineConfig.from_options(quantization=name) for name in (None, "fp8")}
    return {name: survey(e, path, PLUGINS, on_gpu=True) for name, e in engines.items()}


def allocated(executor):
    """Bytes of weights and cache that an executor holds."""
    parts = parts_of(executor._model, skip=(executor._ops,))
    caches = [cache for cache in executor._caches if cache is not None]
    weights = storage_bytes(part for part in parts if isinstance(part, torch.Tensor))
    kept = (t for c in caches for t in (c.key, c.value, c.key_scale, c.value_scale))
    return weights, storage_bytes(t for t in kept if t is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", CASES)
def test_every_family_is_planned_within_5_percent_of_what_a_start_allocates(
    architecture, dtype, folder
):
    config = {**CASES[architecture].config, "architectures": [architecture]}
    path = folder({**GPT2, **config} if architecture == "GPT2LMHeadModel" else config)
    engine = EngineConfig.from_options(
        load_format="dummy", dtype=dtype, cpu_kv_cache_gib=0.005, device="cpu", backend="torch"
    )
    plan, resolved = plan_engine(engine, path, PLUGINS, gpu=None)
    executor = build_executor(engine, path, PLUGINS, "serve")
    weights, cache = allocated(executor)
    assert plan.weight_bytes == pytest.approx(weights, rel=0.05)
    assert plan.cache_bytes == cache
    assert plan.num_blocks == executor.num_blocks
    assert plan.max_model_len == executor.max_model_len
    state = executor._state
    assert plan.row_bytes == state.tokens.nbytes + state.block_tables.nbytes
    assert resolved == executor.config


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        {"kv_cache_memory_bytes": 3 << 20, "kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "int8"},
        {"num_gpu_blocks_override": 37, "block_size": 32},
        {"max_model_len": -1, "cpu_kv_cache_gib": 0.0002},
        {"preset": "low-latency", "max_num_seqs": 3},
        {"enable_lora": True, "max_loras": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_change_a_plan_as_they_change_a_start(options, folder):
    config = CASES["LlamaForCausalLM"].config
    path = folder({**config, "architectures": ["LlamaForCausalLM"]})
    base = dict(load_format="dummy", cpu_kv_cache_gib=0.005, device="cpu", backend="torch")
    engine = EngineConfig.from_options(**{**base, **options})
    plan, resolved = plan_engine(engine, path, PLUGINS, gpu=None)
    executor = build_executor(engine, path, PLUGINS, "serve")
    weights, cache = allocated(executor)
    assert plan.weight_bytes == pytest.approx(weights, rel=0.05)
    assert plan.cache_bytes == cache
    assert (plan.num_blocks, plan.max_model_len) == (executor.num_blocks, executor.max_model_len)
    assert resolved == executor.config


STORED = {
    "gptq": gptq(4, 64, symmetric=False, version=1, reorders=False),
    "awq": awq(64),
    "whole numbers": whole_numbers(),
    "float blocks": float_blocks(),
    "bitsandbytes": bitsandbytes_4(nested=True),
}


@pytest.mark.parametrize("form", STORED)
def test_weights_of_few_bits_are_counted_as_they_are_kept(form, folder):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    config = {**CASES["LlamaForCausalLM"].config, **sizes, "architectures": ["LlamaForCausalLM"]}
    path = folder({**config, "quantization_config": dict(STORED[form].config)})
    engine = EngineConfig.from_options(
        load_format="dummy", dtype="bfloat16", cpu_kv_cache_gib=0.005, backend="torch", device="cpu"
    )
    plan, _ = plan_engine(engine, path, PLUGINS, gpu=None)
    assert plan.quantization == STORED[form].config["quant_method"]
    executor = build_executor(engine, path, PLUGINS, "serve")
    assert plan.weight_bytes == pytest.approx(allocated(executor)[0], rel=0.05)


def test_weights_and_cache_of_a_known_model_are_the_published_ones(plan):
    found = plan(80)
    rope = 131072 * 128 * 4
    assert found.weight_bytes == 2 * PARAMETERS_8B + rope
    assert found.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert [group.num_layers for group in found.groups] == [32]
    assert plan(80, quantization="fp8").weight_bytes < 0.6 * found.weight_bytes
    assert plan(80, kv_cache_dtype="fp8").kv_bytes_per_token == found.kv_bytes_per_token // 2
    whole = plan(80, kv_cache_dtype="int8").kv_bytes_per_token
    assert whole * 256 == found.kv_bytes_per_token * 132  # with a scale for each 128 elements


def test_the_cache_gets_what_the_rest_leaves(plan):  # MEM-1, MEM-4
    found = plan(48)
    parts = found.weight_bytes + found.step_bytes + found.outside_bytes + found.cache_bytes
    assert 0 <= found.requested_bytes - parts < found.block_bytes
    assert found.requested_bytes == pytest.approx(0.92 * 48 * GIB)


@given(
    gib=st.floats(8, 200),
    length=st.one_of(st.just(-1), st.integers(1, 131072)),
    seqs=st.integers(1, 2000),
    quantization=st.sampled_from([None, "fp8"]),
)
def test_a_plan_promises_no_more_than_there_is(surveys, gib, length, seqs, quantization):
    found = surveys[quantization]
    engine = EngineConfig.from_options(
        max_model_len=length, max_num_seqs=seqs, quantization=quantization
    )
    plan, _ = share_out(engine, found, Gpu(total_bytes=int(gib * GIB)), "serve")
    held = plan.weight_bytes + plan.step_bytes + plan.outside_bytes + plan.cache_bytes
    assert not plan.fits or held <= plan.requested_bytes <= plan.total_bytes
    assert plan.fits == (plan.longest_that_fits >= max(plan.max_model_len, 1))
    for tokens, count in plan.concurrency_by_length.items():
        needed = count * memory.blocks_for(found.groups, tokens, plan.block_size, 10**9)
        assert needed <= max(plan.num_blocks - 1, 0)
        assert count <= seqs
    counts = list(plan.concurrency_by_length.values())
    assert counts == sorted(counts, reverse=True)
    assert not plan.fits or counts[-1] >= 1


def test_a_plan_that_does_not_fit_says_what_would(plan):
    found = plan(24)
    assert not found.fits
    assert f"largest max_model_len that fits is {found.longest_that_fits}" in found.problem
    changes = {remedy.change: remedy.result for remedy in found.remedies}
    assert f"--max-model-len {found.longest_that_fits}" in changes
    assert "--quantization fp8 --max-model-len auto" in changes
    assert plan(24, max_model_len=found.longest_that_fits).fits
    assert not plan(
        24, max_model_len=found.longest_that_fits + 1024
    ).fits  # rotary tables shrink too
    larger = next(change for change in changes if change.startswith("a GPU of "))
    assert plan(float(larger.split()[3]) + 0.01).fits
    assert not plan(float(larger.split()[3]) - 0.1).fits


def test_weights_that_do_not_fit_are_named_with_a_format_that_would(plan):
    found = plan(16)
    assert "the weights need 15.02 GiB" in found.problem
    assert found.remedies[0].change == "--quantization fp8 --max-model-len auto"
    assert plan(16, quantization="fp8", max_model_len=-1).fits


def test_what_binds_is_memory_or_the_number_of_sequences(plan):
    assert plan(80).limit == "memory"
    assert plan(80).concurrency == pytest.approx(3.5, abs=0.1)
    short = plan(80, max_model_len=4096, max_num_seqs=8)
    assert short.limit == "max_num_seqs"
    assert short.concurrency_by_length == {1024: 8, 4096: 8}


def test_a_window_bounds_what_a_long_sequence_takes(plan):
    mistral = {**LLAMA_8B, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    found = plan(24, config=mistral, max_model_len=65536)
    assert [group.window for group in found.groups] == [4096]
    assert found.fits
    assert found.concurrency > plan(24, max_model_len=32768).concurrency


def test_an_encoder_keeps_nothing_and_is_bound_by_its_sequences(plan):
    bert = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "vocab_size": 30522,
        "type_vocab_size": 2,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    found = plan(24, config=bert)
    assert found.fits
    assert (found.cache_bytes, found.concurrency, found.groups) == (0, None, ())
    assert found.limit == "max_num_seqs"


def test_defaults_follow_the_gpu_that_is_planned_for(plan):  # CFG-2
    assert plan(80).max_num_seqs == 1024
    assert plan(80, is_a100=True).max_num_seqs == 256
    assert plan(80, usage="offline").max_num_batched_tokens == 16384
    assert plan(80, preset="low-latency").max_num_batched_tokens == 2048


def test_the_largest_step_grows_with_its_tokens_and_its_rows(plan):
    steps = [plan(80, max_num_batched_tokens=n).step_bytes for n in (1024, 8192, 16384)]
    assert steps == sorted(steps)
    rows = plan(80, max_num_batched_tokens=1024, max_num_seqs=1024).step_bytes
    assert rows >= 1024 * 4 * LLAMA_8B["vocab_size"]


def test_headers_beside_a_config_are_believed_and_missing_shards_are_noted(plan, folder):
    path = folder(LLAMA_8B)
    (path / "model-00001-of-00002.safetensors").write_bytes(b"")
    (path / "model.safetensors.index.json").write_text("{}")
    found = plan(24)
    assert found.weight_bytes == plan(24, load_format="dummy").weight_bytes
    assert "sizes are by config.json alone" in found.notes[0]


def test_a_backend_that_cannot_be_asked_is_noted(folder):
    class Elsewhere:
        @hookimpl
        def pagedcore_backends(self):
            def refuse(device):
                raise ConfigError(f"no {device} here")

            return {"elsewhere": refuse}

    plugins = load_plugins()
    plugins.register(Elsewhere(), name="elsewhere")
    engine = EngineConfig.from_options(backend="elsewhere")
    found = survey(engine, folder(LLAMA_8B), plugins, on_gpu=True)
    assert found.notes == (
        "block_size is that of plain torch, since 'elsewhere' cannot be asked: no meta here",
    )


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"hidden_size": "wide"}, {}, ModelError, "hidden_size"),
        ({"max_position_embeddings": None}, {}, ModelError, "max_position_embeddings"),
        ({}, {"max_model_len": 200_000}, ConfigError, "131072"),
        ({}, {"max_num_batched_tokens": 8, "max_num_seqs": 9}, ConfigError, "max_num_seqs"),
    ],
)
def test_what_no_memory_would_help_is_an_error(plan, changes, options, error, message):
    with pytest.raises(error, match=message):
        plan(80, config={**LLAMA_8B, **changes}, **options)


def test_a_smaller_cache_is_proposed_where_it_helps(plan):
    options = dict(quantization="fp8")
    changes = [remedy.change for remedy in plan(24, **options).remedies]
    assert {"--kv-cache-dtype fp8", "--kv-cache-dtype int8"} <= set(changes)
    assert all(plan(24, kv_cache_dtype=name, **options).fits for name in ("fp8", "int8"))
