"""`pagedcore plan`: sizes, settings with their reasons, and a status that says whether it fits."""

import json
from pathlib import Path

import pytest

from pagedcore import hookimpl
from pagedcore.cli import main
from pagedcore.cli.plan import parse_gpu
from pagedcore.errors import ConfigError
from pagedcore.plugins import load_plugins

GIB = 2**30
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


@pytest.fixture
def planned(folder, capsys):
    def run(*flags):
        status = main(["plan", folder, "--json", *flags])
        return status, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(
    ("text", "is_a100", "size"),
    [
        ("24GiB", False, 24 * GIB),
        ("80GB", False, 80 * 10**9),
        ("0.5 TiB", False, 512 * GIB),
        ("81559MiB", False, 81559 * 2**20),
        ("A100:80GiB", True, 80 * GIB),
        ("NVIDIA A100-SXM4:79.15GiB", True, int(79.15 * GIB)),
        ("H100:80GiB", False, 80 * GIB),
    ],
)
def test_a_gpu_is_its_memory_and_perhaps_a_name(text, is_a100, size):
    assert parse_gpu(text) == (is_a100, size)


@pytest.mark.parametrize("text", ["", "24", "24Gi", "H100", "-1GiB", "0GiB", "nanGiB", "1e3GiB"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ConfigError, match=r"such as 24GiB.*not"):
        parse_gpu(text)


def test_the_plan_is_readable(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["plan", folder, "--gpu", "24GiB"]) == 0
    out = capsys.readouterr().out
    assert "Qwen3ForCausalLM, bfloat16, backend triton" in out
    assert "blocks of 64 tokens" in out
    assert "114688 bytes per token" in out
    assert "the model's tensors, counted" in out
    assert "fits" in out.splitlines()[-1]
    assert "memory binds" in out.splitlines()[-1]


def test_the_plan_can_be_read_by_a_program(planned):
    status, told = planned("--gpu", "24GiB", "--max-num-seqs", "8")
    assert status == 0
    assert told["fits"]
    assert told["kv_bytes_per_token"] == 114688
    assert told["num_blocks"] * told["block_bytes"] == told["cache_bytes"]
    assert told["limit"] == "memory"
    assert told["settings"][0]["name"] == "dtype"


def test_every_setting_says_where_it_comes_from_and_why(planned):
    flags = ["--gpu", "24GiB", "--preset", "low-latency", "--max-num-seqs", "8"]
    settings = {each["name"]: each for each in planned(*flags)[1]["settings"]}
    assert settings["max_num_seqs"]["value"] == 8
    origins = {name: each["origin"] for name, each in settings.items()}
    assert origins["max_num_seqs"] == "given"
    assert origins["max_num_batched_tokens"] == "preset low-latency"
    assert origins["max_model_len"] == origins["dtype"] == "model"
    assert origins["block_size"] == "backend"
    assert origins["backend"] == "device"
    assert origins["gpu_memory_utilization"] == "default"
    assert [
        n for n, each in settings.items() if not each["why"] and each["origin"] != "given"
    ] == []


def test_a_default_that_another_setting_moved_says_so(planned):
    flags = ["--gpu", "24GiB", "--preset", "low-latency", "--max-num-batched-tokens", "32"]
    settings = {each["name"]: each for each in planned(*flags)[1]["settings"]}
    assert settings["max_num_seqs"]["value"] == 32
    assert "moved from 64" in settings["max_num_seqs"]["why"]


def test_a_plan_that_does_not_fit_ends_with_1_and_names_what_would(folder, planned, capsys):
    status, told = planned("--gpu", "4GiB")
    assert status == 1
    assert not told["fits"]
    assert "largest max_model_len that fits" in told["problem"]
    assert main(["plan", folder, "--gpu", "4GiB"]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert f"--max-model-len {told['longest_that_fits']}" in out


def test_on_a_cpu_the_cache_has_the_size_that_is_set(planned):
    _, told = planned("--device", "cpu", "--cpu-kv-cache-gib", "0.25", "--max-model-len", "auto")
    assert told["device"] == "cpu"
    assert told["cache_bytes"] == pytest.approx(GIB / 4, rel=0.01)
    assert told["step_bytes"] == told["outside_bytes"] == 0


def test_a_config_may_be_named_itself(folder, capsys):
    assert main(["plan", f"{folder}/config.json", "--gpu", "24GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "Qwen3ForCausalLM"


def test_of_a_hub_config_json_alone_is_fetched(folder, capsys, monkeypatch):
    class Hub:
        def fetch(self, name, revision):
            raise AssertionError("weights are not needed")

        def fetch_config(self, name, revision):
            assert (name, revision) == ("org/name", "v1")
            return Path(folder)

    class Source:
        @hookimpl
        def pagedcore_sources(self):
            return {"hub": Hub}

    def load(*given):
        plugins = load_plugins(*given)
        plugins.register(Source(), name="hub")
        return plugins

    monkeypatch.setattr("pagedcore.cli.plan.load_plugins", load)
    assert main(["plan", "hub:org/name", "--revision", "v1", "--gpu", "24GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "24GiB", "--device", "cpu"], "contradict each other"),
        (["--gpu", "24"], "gpu must be an amount of memory"),
        (["--gpu", "24GiB", "--max-model-len", "50000"], "the model's own 40960"),
        (["--gpu", "24GiB", "--quantization", "fp9"], "did you mean 'fp8'"),
        (["--gpu", "24GiB", "--backend", "tritom"], "did you mean 'triton'"),
    ],
)
def test_what_cannot_be_planned_ends_with_1_in_one_line(folder, capsys, flags, message):
    assert main(["plan", folder, *flags]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_a_config_is_named(tmp_path, capsys):
    assert main(["plan", str(tmp_path), "--gpu", "24GiB"]) == 1
    assert "config.json" in capsys.readouterr().err
