"""What keeps `serve` from starting is told in one line, before anything is loaded."""

import socket

import pytest

from pagedcore import hookimpl
from pagedcore.cli import main
from pagedcore.errors import ModelError
from pagedcore.plugins import register


class Mount:
    """A plugin that offers a server which only says that it was asked."""

    def __init__(self, error=None):
        self.error = error
        self.asked = 0

    @hookimpl
    def pagedcore_servers(self):
        return {"fake": self.mount}

    def mount(self, engine_config, server_config):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return 0


@pytest.fixture
def mount(monkeypatch):
    plugin = Mount()
    monkeypatch.setattr(
        "pagedcore.cli.serve.load_plugins", lambda disabled, only: register({"p": plugin})
    )
    return plugin


def test_an_unknown_server_names_those_that_are_installed(mount, capsys):
    assert main(["serve", "--server", "fak"]) == 1
    error = capsys.readouterr().err
    assert "did you mean 'fake'" in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_named_before_the_mount_is_asked(mount, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--server", "fake", "--port", port]) == 1
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1 port {port}" in error
    assert "--port" in error
    assert error.count("\n") == 1
    assert mount.asked == 0


def test_an_address_of_somewhere_else_is_named(mount, capsys):
    assert main(["serve", "--server", "fake", "--host", "192.0.2.1", "--port", "0"]) == 1
    assert "cannot listen on 192.0.2.1" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_one_line(mount, capsys):
    mount.error = ModelError("no config.json\nin that folder")
    assert main(["serve", "--server", "fake", "--port", "0"]) == 1
    assert capsys.readouterr().err == "pagedcore: no config.json in that folder\n"


def test_a_bug_is_not_hidden(mount):
    mount.error = ZeroDivisionError("oops")
    with pytest.raises(ZeroDivisionError):
        main(["serve", "--server", "fake", "--port", "0"])


def test_an_interrupt_ends_quietly_with_130(mount, capsys):
    mount.error = KeyboardInterrupt()
    assert main(["serve", "--server", "fake", "--port", "0"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_preset_is_told_with_what_was_given_in_its_place(mount, caplog):
    with caplog.at_level("INFO", logger="pagedcore.cli.serve"):
        flags = ["--preset", "low-latency", "--max-num-seqs", "9"]
        assert main(["serve", "--server", "fake", "--port", "0", *flags]) == 0
    assert "preset low-latency: max_num_seqs=9 (given), max_num_batched_tokens=" in caplog.text
