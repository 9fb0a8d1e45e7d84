"""`pagedcore bench kernels`: it asks a backend, and shows and writes what that measures."""

import json
import os
from dataclasses import dataclass

import pytest
import torch

from pagedcore import hookimpl
from pagedcore.cli import main
from pagedcore.cli.bench import kernels
from pagedcore.execution.kernel_bench import Check, Figure, Measured, Time, Trial
from pagedcore.plugins import register


@dataclass
class Setting:
    tile: int


class Fake:
    """Measures nothing, and remembers how it was asked."""

    tunable = ("decode",)

    def __init__(self):
        self.asked, self.error = None, 0.0

    def kernel_bench(self, *, small=False, cache_gib=16.0):
        self.asked = (small, cache_gib)
        return self

    def ceilings(self):
        return {"B/s": 4e12, "FLOP/s": 800e12}

    def checks(self):
        yield Check("an exact kernel", 0.0, 1e-3)
        yield Check("a rough kernel", self.error, 1e-3)

    def figures(self):
        passed = Time(10.0, 9.0, 12.0, 20)
        yield Figure("decode", "B 8 ctx [1k]", passed, 3e12, "B/s")
        yield Figure("decode", "B 1 ctx 1k", passed, 1e12, "B/s")
        yield Figure("extend", "B 8 new 1k", passed, 400e12, "FLOP/s")

    def trials(self, kernel):
        yield from [Trial("B 8", Setting(tile), tile * 1e11) for tile in (16, 64, 32)]


@pytest.fixture
def fake(monkeypatch):
    """The only backend that is installed, where there is no GPU."""
    backend = Fake()

    class Plugin:
        @hookimpl
        def pagedcore_backends(self):
            return {"triton": lambda device: backend, "mute": lambda device: object()}

    monkeypatch.setattr(kernels, "load_plugins", lambda disabled: register({"fake": Plugin()}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return backend


def run(*flags):
    return main(["bench", "kernels", "--dry-run", *flags])


def test_rates_stand_beside_what_the_device_can_do(fake, capsys, tmp_path):
    path = tmp_path / "result.json"
    assert run("--output-json", str(path), "--cache-gib", "2") == 0
    assert fake.asked == (True, 2.0)
    shown = capsys.readouterr().out
    assert "2 of 2" in shown
    assert "B 8 ctx [1k]" in shown
    assert "3.000 TB/s" in shown
    assert "75.0%" in shown
    assert "400.000 TFLOP/s" in shown
    result = json.loads(path.read_text())
    assert result["ceilings"] == {"B/s": 4e12, "FLOP/s": 800e12}
    assert [figure["rate"] for figure in result["figures"]] == [3e12, 1e12, 400e12]
    assert result["figures"][0]["time"]["median"] == 10.0
    assert result["trials"] == {}


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_wrong_kernel_is_named_and_is_the_status(fake, capsys, error):
    fake.error = error
    assert run() == 1
    shown = capsys.readouterr().out
    assert "a rough kernel" in shown
    assert "1 of 2" in shown


def test_parts_can_be_left_out(fake, capsys, tmp_path):
    path = tmp_path / "result.json"
    assert run("--skip", "checks", "speed", "--output-json", str(path)) == 0
    result = json.loads(path.read_text())
    assert result["checks"] == result["figures"] == []


def test_settings_are_searched_and_the_best_comes_first(fake, capsys):
    assert run("--tune", "decode", "--skip", "checks") == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"tile={tile}") for tile in (64, 32, 16)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--skip", "nothing"], "checks and speed"),
        (["--tune", "copy"], "may hold decode"),
        (["--backend", "mute"], "does not measure its kernels"),
        (["--backend", "tritn"], "did you mean 'triton'"),
        (["--cache-gib", "0"], "above 0"),
        (["--plot", "chart.pdf"], "ends in .png"),
        (["--plot", "chart.png", "--skip", "speed"], "drop one"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(fake, capsys, flags, message):
    assert run(*flags) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_a_gpu_one_line_names_the_dry_run(fake, capsys):
    assert main(["bench", "kernels"]) == 1
    error = capsys.readouterr().err
    assert "NVIDIA GPU" in error
    assert "--dry-run" in error
    assert error.count("\n") == 1
    assert fake.asked is None


def test_a_dry_run_without_a_gpu_asks_for_the_interpreter(fake, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert run("--skip", "checks") == 0
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_a_backend_measures_if_it_has_the_method():
    assert isinstance(Fake(), Measured)
    assert not isinstance(object(), Measured)


def test_shares_are_drawn_and_the_same_figures_make_the_same_file(fake, tmp_path):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path in paths:
        assert run("--skip", "checks", "--plot", str(path)) == 0
    one, two = (path.read_bytes() for path in paths)
    assert one.startswith(b"\x89PNG")
    assert one == two
