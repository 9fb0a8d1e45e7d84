"""What cannot start says so in one line, with the remedy, before any weight is read."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest

from pagedcore import LLM
from pagedcore.cli import main
from pagedcore.errors import ConfigError, ModelError, PagedcoreError, UnknownNameError
from pagedcore.execution.checkpoint import Checkpoint

ON_CPU = ["--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "tensors", refuse)


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the model that may be broken."""
    copy = tmp_path / "model"
    shutil.copytree(tiny.folder, copy)
    return copy


def start_error(capsys, *flags):
    """The line that the command line ends with."""
    assert main(["generate", "hello", *ON_CPU, *map(str, flags)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pagedcore: ")
    assert err.count("\n") == 1
    return err


def write_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(config), encoding="utf-8")


# The model


def test_a_model_that_is_fine_comes_as_far_as_its_weights(folder):
    with pytest.raises(AssertionError, match="a weight was read"):
        LLM(folder, device="cpu")


def test_a_folder_that_is_not_there(capsys, tmp_path):
    error = start_error(capsys, "--model", tmp_path / "nothing")
    assert "there is no folder or GGUF file" in error
    assert "Check the path" in error


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2-135", "Did you mean 'smollm2-135m'?"),
        ("Qwen/Qwen3-0.6B", "write hf:Qwen/Qwen3-0.6B"),
        ("gguff:x", "no source is named 'gguff': did you mean 'gguf'?"),
    ],
)
def test_a_name_that_nothing_has(capsys, name, hint):
    assert hint in start_error(capsys, "--model", name)


def missing(file):
    return lambda folder: (folder / file).unlink()


def holding(file, text):
    return lambda folder: (folder / file).write_text(text, encoding="utf-8")


def configured(**values):
    return lambda folder: write_config(folder, **values)


BROKEN = {
    "no config.json": (missing("config.json"), "holds no config.json", "Name the folder"),
    "half a config.json": (holding("config.json", '{"a": '), "config.json must hold", "Fetch"),
    "a list as config.json": (holding("config.json", "[]"), "must hold a JSON object", "Fetch"),
    "no architecture": (configured(architectures=[]), "names no architecture", "architectures"),
    "an unknown architecture": (
        configured(architectures=["LlamaForCasualLM"]),
        "no model is named 'LlamaForCasualLM'",
        "did you mean 'LlamaForCausalLM'?",
    ),
    "an unknown weight format": (
        configured(quantization_config={"quant_method": "fp9"}),
        "no quantizer is named 'fp9'",
        "did you mean 'fp8'?",
    ),
    "a weight format without a name": (
        configured(quantization_config={"bits": 4}),
        "quantization_config names no quant_method",
        "config.json",
    ),
    "no length": (
        configured(max_position_embeddings=None),
        "how long a context the model takes",
        "max_position_embeddings is missing",
    ),
    "no tokenizer": (missing("tokenizer.json"), "has no tokenizer.json", "--tokenizer"),
    "half a tokenizer": (holding("tokenizer.json", "{"), "cannot be read", "Fetch"),
    "no weights": (missing("model.safetensors"), "has neither model.safetensors nor", "Fetch"),
    "empty weights": (holding("model.safetensors", ""), "model.safetensors has 0 bytes", "Fetch"),
    "defaults out of range": (
        holding("generation_config.json", '{"top_p": 3}'),
        "generation_config.json: top_p must be in (0, 1]",
        "--generation-config none",
    ),
    "half a chat template": (
        holding("chat_template.jinja", "{% for"),
        "the chat template is not valid Jinja",
        "--chat-template",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_told_with_the_remedy(capsys, folder, name):
    spoil, reason, remedy = BROKEN[name]
    spoil(folder)
    error = start_error(capsys, "--model", folder)
    assert reason in error
    assert remedy in error


def test_a_file_that_is_no_model(capsys, tmp_path):
    holding("notes.txt", "hello")(tmp_path)
    assert "a model is a folder or a GGUF file" in start_error(
        capsys, "--model", tmp_path / "notes.txt"
    )


# Settings

SETTINGS = {
    "an unknown weight format": (["--quantization", "fp9"], "did you mean 'fp8'?"),
    "an unknown backend": (["--backend", "torc"], "did you mean 'torch'? Installed: "),
    "a backend of another device": (["--backend", "triton"], "backend='torch'"),
    "an unknown cache format": (
        ["--kv-cache-dtype", "int9"],
        "no kv format is named 'int9': did you mean 'int8'? Installed: auto, fp8, fp8_e4m3, int8",
    ),
    "an unknown policy": (["--scheduling-policy", "prio"], "no policy is named 'prio': did you"),
    "an unknown plugin to disable": (["--disable-plugin", "modells"], "did you mean 'models'?"),
    "a model plugin that is disabled": (
        ["--disable-plugin", "models"],
        "no model is named 'LlamaForCausalLM': install a plugin that provides it",
    ),
    "a device of another kind": (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
    "longer than the model": (
        ["--max-model-len", "1K"],
        "max_model_len=1024 is more than the model's own 256: lower it, or use -1",
    ),
    "longer than the cache": (  # MEM-6
        ["--num-gpu-blocks-override", "6"],
        "max_model_len=256 needs 0.000122 GiB of cache and 0.000038 GiB are available; the largest "
        "max_model_len that fits is 80. Lower max_model_len",
    ),
    "a cache of nothing": (
        ["--cpu-kv-cache-gib", "0.00001"],
        "the largest max_model_len that fits is 0",
    ),
    "a cache that the machine cannot hold": (
        ["--cpu-kv-cache-gib", "1e7"],
        "a cache of 10000000.00 GiB was asked for",
    ),
    "a budget below the sequences": (  # CFG-3
        ["--max-num-seqs", "8", "--max-num-batched-tokens", "4"],
        "max_num_batched_tokens (4) must be at least max_num_seqs (8)",
    ),
    "whole prompts beyond the budget": (
        ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "128", "--max-num-seqs", "8"],
        "max_num_batched_tokens (128) must be at least max_model_len (256)",
    ),
    "a chat template that is none": (["--chat-template", "{% if"], "not valid Jinja"),
    "a tokenizer that is not there": (["--tokenizer", "/nothing"], "no folder or GGUF file"),
    "a revision of a folder": (["--revision", "main"], "leave it out"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_be_met_is_told(capsys, tiny, monkeypatch, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it, kernels run on a CPU, too
    flags, words = SETTINGS[name]
    assert words in start_error(capsys, "--model", tiny.folder, *flags)


def test_a_gpu_on_a_machine_without_one(capsys, tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    error = start_error(capsys, "--model", tiny.folder, "--device", "cuda")
    assert "there is no device 'cuda'" in error
    assert "--device cpu" in error


def test_a_hash_whose_library_is_missing_is_named(tiny, monkeypatch):  # CFG-1
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ConfigError, match=r"'xxhash': pip install pagedcore\[hash\]"):
        tiny.llm(prefix_caching_hash_algo="xxhash")


KEYWORDS = {
    "an unknown one": (dict(max_num_seq=4), "'max_num_seq': did you mean 'max_num_seqs'?"),
    "text for a number": (dict(max_num_seqs="8"), "max_num_seqs must be a whole number or None"),
    "half a sequence": (dict(max_num_seqs=2.5), "not 2.5"),
    "a truth value for a number": (dict(block_size=True), "block_size must be a whole number"),
    "a number for a truth value": (dict(enforce_eager=1), "must be True or False, not 1"),
    "no number": (dict(gpu_memory_utilization=float("nan")), "must be a number, not nan"),
    "none of the choices": (dict(dtype="int8"), "dtype must be one of auto, float16, half"),
    "none of the kinds": (dict(logprobs_mode="raw"), "one of raw_logprobs, processed_logprobs"),
    "numbers for names": (dict(served_model_name=[1]), "must be a list of texts, not [1]"),
    "a number for a name": (dict(device=0), "device must be a text, not 0"),
    "below the least": (dict(block_size=24), "block_size must be a power of two, not 24"),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_keyword_is_held_against_its_declaration(tiny, name):
    options, words = KEYWORDS[name]
    with pytest.raises(ConfigError) as error:
        tiny.llm(**options)
    assert words in str(error.value)


def test_every_start_error_is_of_the_one_tree(tiny):
    """One `except PagedcoreError` is enough for a program."""
    kinds = {ConfigError: dict(device="tpu"), UnknownNameError: dict(backend="x")}
    kinds[ModelError] = dict(tokenizer="/nothing")
    for kind, options in kinds.items():
        with pytest.raises(kind) as error:
            tiny.llm(**options)
        assert isinstance(error.value, PagedcoreError)


def test_a_keyword_of_the_past_warns_once_and_changes_nothing(tiny, caplog, monkeypatch):
    """LEG-1, LEG-2"""
    monkeypatch.undo()  # weights may be read
    with (
        caplog.at_level(logging.WARNING),
        pytest.warns(DeprecationWarning, match="swap_space is deprecated") as caught,
        tiny.llm(swap_space=4) as llm,
    ):
        assert llm.engine.info.max_num_seqs == 8
    assert len(caught) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "swap_space is deprecated: has no effect" in caplog.text


# The process


def pagedcore(*arguments):
    command = [sys.executable, "-m", "pagedcore.cli", "generate", "hello", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_the_process_ends_with_1_and_one_line(folder):
    missing("config.json")(folder)
    status, out, lines = pagedcore("--model", str(folder), *ON_CPU)
    assert (status, out, len(lines)) == (1, "", 1)
    assert "holds no config.json" in lines[0]


def test_an_unknown_flag_ends_the_process_with_2_and_the_nearest_flag():  # CFG-4
    status, out, lines = pagedcore("--max-model-length", "5")
    assert (status, out, len(lines)) == (2, "", 1)
    assert "Did you mean --max-model-len?" in lines[0]


def test_a_flag_of_the_past_warns_in_one_line_and_the_rest_goes_on(tiny):  # LEG-2
    flags = ["--model", str(tiny.folder), "--swap-space", "4", "--max-tokens", "2", *ON_CPU]
    status, out, lines = pagedcore(*flags)
    assert status == 0
    assert out.endswith("\n")
    assert [line for line in lines if "deprecated" in line] == [
        "WARNING --swap-space is deprecated: has no effect: preemption recomputes"
    ]
