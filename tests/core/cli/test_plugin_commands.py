"""`pagedcore plugins` on installed plugins that work, and on some that do not."""

from types import SimpleNamespace

import pytest

from pagedcore import hookimpl
from pagedcore.cli import main
from pagedcore.errors import ConfigError


class Good:
    @hookimpl
    def pagedcore_servers(self):
        return {"fine": lambda engine_config, server_config: 0}

    @hookimpl
    def pagedcore_step_finished(self, stats):
        pass


class Twin:
    @hookimpl
    def pagedcore_servers(self):
        return {"fine": lambda engine_config, server_config: 1}


class Careless:
    @hookimpl
    def pagedcore_servers(self):
        return {"odd": lambda: 0, "[/wrong]": 3}

    @hookimpl
    def pagedcore_models(self):
        return {"Thing": lambda: "no class"}

    @hookimpl
    def pagedcore_backends(self):
        return {"absent": self.absent, "empty": lambda device: object()}

    def absent(self, device):
        raise ConfigError(f"no {device} here")


@pytest.fixture
def installed(monkeypatch):
    def install(**plugins):
        entries = [
            SimpleNamespace(
                name=name,
                dist=SimpleNamespace(name=f"dist-{name}", version="1.2"),
                load=plugin if isinstance(plugin, type) else raiser(plugin),
            )
            for name, plugin in plugins.items()
        ]
        monkeypatch.setattr("pagedcore.cli.installed.entry_points", lambda group: entries)
        monkeypatch.setenv("COLUMNS", "200")

    return install


def raiser(error):
    def load():
        raise error

    return load


def test_list_shows_where_plugins_come_from_and_what_they_offer(installed, capsys):
    installed(good=Good, broken=ModuleNotFoundError("No module named 'x'"))
    assert main(["plugins", "list"]) == 0
    out = capsys.readouterr().out
    assert "dist-good 1.2" in out
    assert "server: fine" in out
    assert "observer" in out
    assert "does not load: ModuleNotFoundError: No module named 'x'" in out


def test_doctor_is_content_with_plugins_that_load(installed, capsys):
    installed(good=Good)
    assert main(["plugins", "doctor"]) == 0
    assert "problems: 0" in capsys.readouterr().out


def test_doctor_names_what_does_not_load_and_the_remedy(installed, capsys):
    installed(good=Good, broken=ImportError("gone"))
    assert main(["plugins", "doctor"]) == 1
    out = capsys.readouterr().out
    assert "broken from dist-broken 1.2: ImportError: gone" in out
    assert "--disable-plugin broken" in out


def test_doctor_finds_two_that_offer_the_same_name(installed, capsys):
    installed(good=Good, twin=Twin)
    assert main(["plugins", "doctor"]) == 1
    assert "two plugins offer the server 'fine'" in capsys.readouterr().out


def test_a_plugin_that_keeps_its_contract_passes(installed, capsys):
    installed(good=Good)
    for name in ("good", "dist-good"):
        assert main(["plugins", "test", name]) == 0
        assert "server fine" in capsys.readouterr().out


def test_what_breaks_the_contract_is_named(installed, capsys):
    installed(careless=Careless)
    assert main(["plugins", "test", "careless"]) == 1
    out = capsys.readouterr().out
    assert "failed  server odd: it cannot be called as the hook says" in out
    assert "failed  server [/wrong]: a factory is needed, not 3" in out
    assert "failed  model Thing: the factory must return a class" in out
    assert "failed  backend empty: object lacks" in out
    assert "ok      backend absent: cannot run here: no cuda:0 here" in out


def test_a_plugin_that_does_not_load_fails_its_test(installed, capsys):
    installed(broken=ImportError("gone"))
    assert main(["plugins", "test", "broken"]) == 1
    assert "broken does not load: ImportError: gone" in capsys.readouterr().out


def test_a_plugin_that_is_not_installed_names_the_nearest(installed, capsys):
    installed(good=Good)
    assert main(["plugins", "test", "god"]) == 1
    assert "did you mean 'good'" in capsys.readouterr().err
