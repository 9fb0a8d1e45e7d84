"""`pagedcore quantize`: what it writes is read as what it was rounded to, by us and by others."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore import hookimpl
from pagedcore.cli import main
from pagedcore.errors import ConfigError, PluginError
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.quantizing.writer import WriterOptions
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.plugin_checks import plugin_checks
from pagedcore.testing.tiny_models import save_tiny_model
from pagedcore_quantization import pagedcore_quantizers, pagedcore_weight_writers, writers

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
WRITERS = {
    "fp8": ({}, 16 / 448),
    "fp8-block": ({}, 16 / 448),
    "int8": ({}, 0.5 / 127),
    "gptq": ({"group_size": 32}, 1.01 - 0.83 * 14 / 15),
    "gptq 8": ({"group_size": 64, "bits": 8}, 1.1 / 255),
    "gptq by output": ({"group_size": -1}, 1.01 - 0.83 * 14 / 15),
    "awq": ({"group_size": 32}, 2.05 / 15),
}
"""Options by format, and the share of the largest number that no number is off by."""


def writer_of(form):
    options, _ = WRITERS[form]
    return pagedcore_weight_writers()[form.split()[0]](WriterOptions(**options))


def quantize(source, target, form, *more):
    options, _ = WRITERS[form]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    words = ["quantize", str(source), "--format", form.split()[0], "--output", str(target)]
    return main([*words, "--device", "cpu", *flags, *more])


@pytest.fixture
def plain(tmp_path):
    save_tiny_model(tmp_path / "plain", **SIZES)
    return tmp_path / "plain"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", WRITERS)
def test_a_matrix_is_read_as_what_it_was_rounded_to(form, tmp_path):
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    writer = writer_of(form)
    writer.check("a.q_proj", *weight.shape)
    tensors = {f"a.q_proj.{what}": tensor for what, tensor in writer.write(weight).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    settings = writer.config(["lm_head"])
    quantizer = pagedcore_quantizers()[settings["quant_method"]](settings)
    weights = Checkpoint(tmp_path).tensors(torch.float32, torch.device("cpu"))
    method = quantizer.linear(
        weights, TorchOps("cpu"), ["a.q_proj"], 256, [128], bias=False, dim=None
    )
    torch.testing.assert_close(
        method.apply(torch.eye(256)).t(), writer.rounded(weight), rtol=1e-5, atol=1e-6
    )
    error = (writer.rounded(weight) - weight).abs().max()
    assert 0 < error <= WRITERS[form][1] * weight.abs().max()


@pytest.mark.parametrize("form", ["gptq", "gptq by output"])
def test_scales_that_are_searched_lose_less_than_the_largest_number_gives(form, monkeypatch):
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    searched = writer_of(form).rounded(weight) - weight
    monkeypatch.setattr(writers, "_SHARES", (1.0,))
    plain = writer_of(form).rounded(weight) - weight
    assert plain.abs().max() <= 1.01 / 15 * weight.abs().max()
    assert searched.square().mean() < plain.square().mean()


@pytest.mark.parametrize("form", WRITERS)
def test_rows_of_zeros_and_tiny_numbers_stay_finite(form):
    weight = torch.zeros(128, 128)
    weight[1] = 1e-12
    rounded = writer_of(form).rounded(weight)
    assert rounded.isfinite().all()
    assert rounded.abs().max() <= 1e-12


def rounded_model(plain, target, form):
    """The model of 16 bits that a quantized one stands for."""
    target.mkdir()
    writer = writer_of(form)
    tensors = {
        name: writer.rounded(tensor) if name.endswith("_proj.weight") else tensor
        for name, tensor in load_file(plain / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((plain / name).read_bytes())
    return target


@pytest.mark.parametrize("form", WRITERS)
def test_a_quantized_model_gives_the_tokens_it_stands_for(form, plain, tmp_path, tokens):
    assert quantize(plain, tmp_path / "made", form) == 0
    found = tokens(tmp_path / "made")
    if form == "int8":  # whose activations are rounded too
        assert [len(each) for each in found] == [12, 12, 12]
    else:
        assert found == tokens(rounded_model(plain, tmp_path / "wide", form))


def test_what_is_beside_the_weights_comes_along(plain, tmp_path):
    (plain / "1_Pooling").mkdir()
    for name in ("chat_template.jinja", "LICENSE.md", "1_Pooling/config.json"):
        (plain / name).write_text("{}", encoding="utf-8")
    for name in (".cache.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (plain / name).write_text("none of ours", encoding="utf-8")
    quantize(plain, tmp_path / "made", "fp8")
    made = {str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made").rglob("*.*")}
    assert made == {
        *(".pagedcore-quantize.json", "model.safetensors", "config.json"),
        *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        *("chat_template.jinja", "LICENSE.md", "1_Pooling/config.json"),
    }


def test_experts_are_written_too_and_routers_are_not(tmp_path, tokens):
    plain = tmp_path / "plain"
    save_tiny_model(plain, "qwen3_moe", **SIZES, moe_intermediate_size=64)
    assert quantize(plain, tmp_path / "made", "gptq") == 0
    stored = load_file(tmp_path / "made" / "model.safetensors")
    assert "model.layers.0.mlp.experts.5.down_proj.qweight" in stored
    assert "model.layers.0.mlp.gate.weight" in stored
    config = json.loads((tmp_path / "made" / "config.json").read_text(encoding="utf-8"))
    kept = config["quantization_config"]["modules_to_not_convert"]
    assert kept == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert tokens(tmp_path / "made") == tokens(rounded_model(plain, tmp_path / "wide", "gptq"))


def test_files_are_cut_and_those_that_are_there_are_not_written_again(plain, tmp_path, capsys):
    small = f"--max-shard-gib={100_000 / 2**30}"
    quantize(plain, tmp_path / "whole", "awq", small)
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(files) > 3
    quantize(plain, tmp_path / "part", "awq", small)
    part = tmp_path / "part"
    for name in ("config.json", "model.safetensors.index.json", files[1], files[3]):
        (part / name).unlink()  # as if it had been interrupted
    (part / f".{files[1]}.part").write_bytes(b"half")
    (part / files[2]).write_bytes((part / files[2]).read_bytes()[:-1])
    capsys.readouterr()
    assert quantize(plain, part, "awq", small) == 0
    assert f"already: {len(files) - 3}" in capsys.readouterr().out
    expected, found = contents(tmp_path / "whole"), contents(part)
    assert {name: data for name, data in found.items() if not name.startswith(".")} == {
        name: data for name, data in expected.items() if not name.startswith(".")
    }


def complaint(capsys, source, target, form, *more):
    assert quantize(source, target, form, *more) != 0
    return capsys.readouterr().err


def test_what_cannot_be_done_is_said_before_anything_is_written(plain, tmp_path, capsys):
    made = tmp_path / "made"
    assert "no folder" in complaint(capsys, tmp_path / "none", made, "fp8")
    save_tiny_model(tmp_path / "odd", **SIZES | {"intermediate_size": 192})
    said = complaint(capsys, tmp_path / "odd", made, "gptq", "--group-size", "128")
    assert "down_proj' has 192 inputs" in said
    assert "take --group-size 64" in said
    assert "take fp8" in complaint(capsys, tmp_path / "odd", made, "fp8-block")
    assert "must be 4 in awq" in complaint(capsys, plain, made, "awq", "--bits", "8")
    assert "another folder" in complaint(capsys, plain, plain, "fp8")
    text = tmp_path / "text.txt"
    text.write_text("some words", encoding="utf-8")
    assert "leave it out" in complaint(capsys, plain, made, "fp8", f"--calibration={text}")
    assert "cannot be read" in complaint(capsys, plain, made, "awq", "--calibration=none.txt")
    assert "did you mean 'gptq'" in complaint(capsys, plain, made, "gptq", "--format", "gptqq")
    assert not made.exists()


def test_a_folder_of_other_settings_is_left_alone(plain, tmp_path, capsys):
    quantize(plain, tmp_path / "made", "gptq")
    before = contents(tmp_path / "made")
    assert "other settings" in complaint(capsys, plain, tmp_path / "made", "awq")
    assert contents(tmp_path / "made") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    assert "not empty" in complaint(capsys, plain, tmp_path / "full", "awq")


def test_what_is_quantized_is_not_quantized_again(plain, tmp_path, capsys):
    quantize(plain, tmp_path / "made", "int8")
    assert "quantized already" in complaint(capsys, tmp_path / "made", tmp_path / "again", "awq")


def test_a_model_whose_matrices_are_transposed_is_refused(tmp_path, capsys):
    from pagedcore_models.cases import CASES

    save_tiny_model(tmp_path / "gpt2", CASES["GPT2LMHeadModel"].config)
    said = complaint(capsys, tmp_path / "gpt2", tmp_path / "made", "int8")
    assert "GPT2LMHeadModel has no layers" in said


def test_options_that_a_format_lacks_are_refused_by_name():
    for name, make in pagedcore_weight_writers().items():
        with pytest.raises(ConfigError, match=f"must be.*in {name}"):
            make(WriterOptions(bits=3))


TEXT = "The tower stands by the river, and its shadow tells the hour. " * 40


@pytest.fixture
def outliers(tmp_path):
    """A model of as many key as query heads, some of whose inputs are large in every layer."""
    folder = tmp_path / "plain"
    save_tiny_model(folder, **SIZES | {"num_hidden_layers": 1})
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.endswith(("layernorm.weight", "v_proj.weight", "up_proj.weight")):
            large = torch.randperm(len(tensor), generator=generator)[:4]
            tensor[large] *= 20
        if name.endswith("q_proj.weight"):
            tensor *= 0.02  # attention that turns on a score would hide what rounding does
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def runner_of(folder):
    from pagedcore.execution.quantizing.calibration import Runner
    from pagedcore.plugins import choose, load_plugins

    checkpoint = Checkpoint(folder)
    kind = choose(load_plugins(), "pagedcore_models", "LlamaForCausalLM")()
    return Runner(
        checkpoint,
        checkpoint.config,
        kind,
        TorchOps("cpu"),
        torch.float32,
        torch.device("cpu"),
        256,
    )


def hidden_states(folder):
    """Of a quantized folder's model, or of one in 16 bits, after a text."""
    from pagedcore.execution.model import ModelBuild

    runner = runner_of(folder)
    ids = [2 + ord(char) % 200 for char in TEXT[:200]]
    settings = runner.checkpoint.config.get("quantization_config")
    if not settings:
        return runner.hidden(runner.load(), ids)
    build = ModelBuild(
        config=runner.config,
        weights=runner.checkpoint.tensors(torch.float32, runner.device),
        quantizer=pagedcore_quantizers()[settings["quant_method"]](settings),
        ops=runner.ops,
        dtype=torch.float32,
        device=runner.device,
        max_positions=256,
    )
    return runner.hidden(runner.kind(build), ids)


def error_of(folder, plain):
    expected = hidden_states(plain)
    return float((hidden_states(folder) - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", ["awq", "gptq", "int8"])
def test_scales_of_a_text_lose_less_where_some_inputs_are_large(form, outliers, tmp_path, capsys):
    text = tmp_path / "text.txt"
    assert quantize(outliers, tmp_path / "near", form) == 0
    assert quantize(outliers, tmp_path / "scaled", form, f"--calibration={text}") == 0
    assert "7 of them scaled" in capsys.readouterr().out
    near, scaled = (error_of(tmp_path / name, outliers) for name in ("near", "scaled"))
    assert scaled < 0.9 * near


def test_a_scale_that_is_lost_on_the_largest_number_is_lost_for_all_others(tmp_path):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    error = (writer_of("gptq").rounded(weight) - weight).norm() / weight.norm()
    runs = weight.view(64, 4, 32)
    scale = runs.abs().amax(-1, keepdim=True) / 7.5
    nearest = (runs / scale).round().clamp(-8, 7) * scale
    assert error < 0.95 * (nearest - runs).norm() / runs.norm()


def test_scales_go_on_from_where_they_were_found(outliers, tmp_path):
    flags = [f"--calibration={tmp_path / 'text.txt'}", f"--max-shard-gib={200_000 / 2**30}"]
    quantize(outliers, tmp_path / "whole", "awq", *flags)
    quantize(outliers, tmp_path / "part", "awq", *flags)
    part = tmp_path / "part"
    lost = sorted(part.glob("*.safetensors"))[1]
    lost.unlink()
    quantize(outliers, part, "awq", *flags)
    assert contents(part) == contents(tmp_path / "whole")


def test_scales_that_would_change_the_model_are_refused(tmp_path, capsys):
    """Gemma adds 1 to the weights of its norms, so dividing them divides something else."""
    from pagedcore_models.cases import CASES

    save_tiny_model(tmp_path / "plain", CASES["Gemma2ForCausalLM"].config)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    text = f"--calibration={tmp_path / 'text.txt'}"
    said = complaint(capsys, tmp_path / "plain", tmp_path / "made", "gptq", text)
    assert "Leave out --calibration" in said


class Mute:
    """A writer that says it has written something else."""

    balances = False

    def __init__(self, options):
        self._writer = pagedcore_weight_writers()["int8"](options)
        self.check, self.config, self.write = (
            getattr(self._writer, name) for name in ("check", "config", "write")
        )

    def rounded(self, weight):
        return weight * 1.1


def test_a_strangers_format_is_checked_for_being_read_as_it_says():
    class Plugin:
        @hookimpl
        def pagedcore_weight_writers(self):
            return {"mute": Mute, "int8": pagedcore_weight_writers()["int8"]}

    checks = {str(check): check for check in plugin_checks("stranger", Plugin())}
    mute, int8 = (
        next(c for text, c in checks.items() if name in text) for name in ("mute", "int8")
    )
    assert "error 0.0" in int8()
    with pytest.raises(PluginError, match="not read as"):
        mute()
