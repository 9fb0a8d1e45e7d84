"""Flags are the declarations' fields: names, types, defaults, help, and names of the past."""

import dataclasses
import logging
import os
import subprocess
import sys

import pytest

from pagedcore.cli import main
from pagedcore.cli.flags import parse_count
from pagedcore.config import DEPRECATED, EngineConfig
from pagedcore.server_config import ServerConfig


@pytest.fixture
def served(monkeypatch):
    """What `serve` would mount: calls of (engine config, server config), with server "fake"."""
    calls = []

    def mount(engine_config, server_config):
        calls.append((engine_config, server_config))
        return 7

    monkeypatch.setattr("pagedcore.cli.serve.load_plugins", lambda disabled, only: disabled)
    monkeypatch.setattr(
        "pagedcore.cli.serve.choose", lambda manager, hook, name: {"fake": mount}[name]
    )

    def run(*arguments):
        status = main(["serve", *arguments, "--server", "fake", "--port", "0"])
        return status, calls[-1] if calls else None

    return run


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("7", 7),
        ("-1", -1),
        ("1k", 1000),
        ("1.5k", 1500),
        ("2m", 2_000_000),
        ("0.5g", 500_000_000),
        ("32K", 32768),
        ("1M", 2**20),
        ("1.5G", 3 * 2**29),
        (".5K", 512),
    ],
)
def test_counts_have_decimal_and_binary_suffixes(text, count):  # CFG-1
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.0005k", "1kk", "1 k", "1t", "0x10", "nan"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(ValueError, match="not a whole number"):
        parse_count(text)


def test_every_setting_has_a_flag_with_its_docstring_as_help():
    command = [sys.executable, "-m", "pagedcore.cli", "serve", "--help"]
    wide = {**os.environ, "COLUMNS": "220"}  # a process of its own, whose console is not made yet
    result = subprocess.run(command, env=wide, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    shown = "".join(character for character in result.stdout if character.isalnum())
    declarations = [section.default_factory for section in dataclasses.fields(EngineConfig)]
    for declaration in (*declarations, ServerConfig):
        for field in dataclasses.fields(declaration):
            assert field.name.replace("_", "") in shown, field.name
    assert "Mosttokensinonesteppromptsandoutputstogether" in shown
    assert "SLOT4" not in shown
    assert "swapspace" not in shown


def test_flags_reach_the_sections_that_declare_them(served):
    status, (engine, server) = served(
        *("a-model", "--max-model-len", "1.5k", "--no-enable-prefix-caching", "--dtype", "float32"),
        *("--max-num-batched-tokens", "8K", "--kv-watermark", "0.1", "--strict-params"),
        *(
            "--api-key",
            "one",
            "--api-key",
            "two",
            "--served-model-name",
            "x",
            "--host",
            "localhost",
        ),
    )
    assert status == 7
    assert engine.model.model == "a-model"
    assert engine.model.max_model_len == 1500
    assert engine.model.dtype == "float32"
    assert engine.model.served_model_name == ("x",)
    assert engine.scheduler.max_num_batched_tokens == 8192
    assert engine.cache.enable_prefix_caching is False
    assert engine.cache.kv_watermark == 0.1
    assert server.api_key == ("one", "two")
    assert (server.strict_params, server.host) == (True, "localhost")


def test_without_flags_everything_is_as_declared(served, monkeypatch):
    monkeypatch.delenv("PAGEDCORE_API_KEY", raising=False)
    _, (engine, server) = served()
    assert engine == EngineConfig()
    assert server == ServerConfig(port=0)


def test_the_environment_brings_keys_that_no_flag_gives(served, monkeypatch):
    monkeypatch.setenv("PAGEDCORE_API_KEY", "a,b")
    assert served()[1][1].api_key == ("a", "b")
    assert served("--api-key", "c")[1][1].api_key == ("c",)


@pytest.mark.parametrize("text", ["auto", "-1"])
def test_the_longest_length_that_fits_can_be_asked_for(served, text):
    assert served("--max-model-len", text)[1][0].model.max_model_len == -1


def test_the_model_may_be_given_by_name(served):
    assert served("--model", "another")[1][0].model.model == "another"


def test_an_unknown_flag_names_the_nearest_and_ends_with_2(served, capsys):  # CFG-4
    assert served("--max-num-seq", "4") == (2, None)
    error = capsys.readouterr().err
    assert "--max-num-seq" in error
    assert "Did you mean --max-num-seqs?" in error


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--dtype", "int3", "float16"),
        ("--max-num-seqs", "1.5", "not a whole number"),
        ("--kv-watermark", "much", "--kv-watermark"),
    ],
)
def test_a_value_of_the_wrong_type_ends_with_2_in_one_line(served, capsys, flag, value, reason):
    assert served(flag, value) == (2, None)
    error = capsys.readouterr().err
    assert flag in error
    assert reason in error
    assert error.count("\n") == 1


def test_a_value_out_of_range_ends_with_1_in_one_line(served, capsys):
    assert served("--block-size", "24") == (1, None)
    assert capsys.readouterr().err == "pagedcore: block_size must be a power of two, not 24\n"


@pytest.mark.parametrize("name", sorted(DEPRECATED))
def test_a_flag_of_the_past_gives_one_warning_and_changes_nothing(served, caplog, name):  # LEG-1
    flag = "--" + name.replace("_", "-")
    valued = {"swap_space", "num_scheduler_steps", "max_seq_len_to_capture", "preemption_mode"}
    with caplog.at_level(logging.WARNING):
        given = [flag, *(["whatever"] if name in valued else [])]
        _, (engine, _) = served(*given, *given)
    assert engine == EngineConfig()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "deprecated" in caplog.text
    assert flag in caplog.text


def test_of_a_flag_that_is_repeated_the_last_one_counts(served):
    flags = ["--max-num-seqs", "4", "--no-strict-params", "--max-num-seqs", "5", "--strict-params"]
    flags += ["--model", "one", "--model", "two"]
    _, (engine, server) = served(*flags)
    assert engine.scheduler.max_num_seqs == 5
    assert server.strict_params is True
    assert engine.model.model == "two"


def test_logging_requests_wins_over_its_old_opposite(served, caplog):
    assert served("--disable-log-requests", "--enable-log-requests")[1][1].enable_log_requests


def test_help_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from pagedcore.cli import main; main(['--help']);"
        "print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("set()")
    assert all(name in done.stdout for name in ("serve", "generate", "plugins"))
