import types

import pytest

import pagedcore
from pagedcore import hookspecs
from pagedcore.errors import PluginError, UnknownNameError
from pagedcore.plugins import choose, collect, load_plugins, register


def plugin(**hooks):
    module = types.ModuleType("stranger")
    for name, answer in hooks.items():
        if callable(answer):
            answer.__name__ = name
            setattr(module, name, pagedcore.hookimpl(answer))
        else:
            setattr(module, name, answer)
    return module


def quantizers(*names):
    return plugin(pagedcore_quantizers=lambda: dict.fromkeys(names, object))


def test_every_member_of_the_workspace_is_found():
    names = {name for name, _ in load_plugins().list_name_plugin()}
    assert names >= {"core", "kernels", "litserve", "models", "openai", "pytriton", "quantization"}


def test_a_disabled_plugin_is_not_loaded():
    names = {name for name, _ in load_plugins(["quantization"]).list_name_plugin()}
    assert "quantization" not in names
    assert "models" in names


def test_a_plugin_that_is_not_there_cannot_be_disabled():
    with pytest.raises(UnknownNameError, match="no plugin is named 'quantisation': did you mean"):
        load_plugins(["quantisation"])


def test_only_the_plugins_that_are_named_are_loaded_and_the_core():
    names = {name for name, _ in load_plugins(only=["models", "kernels"]).list_name_plugin()}
    assert names == {"core", "kernels", "models"}
    names = {
        name for name, _ in load_plugins(["kernels"], ["models", "kernels"]).list_name_plugin()
    }
    assert names == {"core", "models"}


def test_a_plugin_that_is_not_there_cannot_be_the_only_one():
    with pytest.raises(UnknownNameError, match="no plugin is named 'model': did you mean"):
        load_plugins(only=["model"])


def test_what_plugins_offer_is_merged():
    manager = register({"a": quantizers("int8"), "b": quantizers("fp8", "awq")})
    assert set(collect(manager, "pagedcore_quantizers")) == {"int8", "fp8", "awq"}


def test_two_plugins_may_not_offer_the_same_name():
    manager = register({"ours": quantizers("int8"), "theirs": quantizers("int8")})
    with pytest.raises(PluginError, match=r"quantizer 'int8'.*ours.*theirs.*--disable-plugin"):
        collect(manager, "pagedcore_quantizers")


def test_a_collision_names_the_distributions():
    import pagedcore.builtin

    manager = register(
        {"core": pagedcore.builtin, "mine": plugin(pagedcore_policies=lambda: {"fcfs": object})}
    )
    with pytest.raises(PluginError, match=r"policy 'fcfs': .*core from pagedcore"):
        collect(manager, "pagedcore_policies")


def test_an_unknown_name_suggests_the_nearest_one():
    manager = register({"ours": quantizers("int8", "fp8")})
    with pytest.raises(UnknownNameError) as error:
        choose(manager, "pagedcore_quantizers", "int-8")
    assert str(error.value) == (
        "no quantizer is named 'int-8': did you mean 'int8'? "
        "Installed: fp8, int8 (see `pagedcore plugins list`)."
    )


def test_a_misspelled_hook_is_an_error():
    with pytest.raises(PluginError, match="did you mean 'pagedcore_quantizers'"):
        register({"stranger": plugin(pagedcore_quantizer=lambda: {})})


@pytest.mark.parametrize("requires", ["", ">=1", ">=1,<2", "==1.0", ">=1.0,<=1.0"])
def test_a_plugin_for_this_spec_is_taken(requires):
    register({"stranger": plugin(pagedcore_requires=requires)})


@pytest.mark.parametrize("requires", [">=2", "<1", ">1.0", "==1.1", "nonsense"])
def test_a_plugin_for_another_spec_is_refused(requires):
    with pytest.raises(PluginError, match=r"hook spec|version range"):
        register({"stranger": plugin(pagedcore_requires=requires)})


def test_a_plugin_for_spec_1_still_loads_when_a_minor_version_adds_hooks(monkeypatch):
    monkeypatch.setattr(hookspecs, "SPEC_VERSION", (1, 1))
    register({"stranger": plugin(pagedcore_requires=">=1,<2")})
    monkeypatch.setattr(hookspecs, "SPEC_VERSION", (2, 0))
    with pytest.raises(PluginError, match=r"hook spec >=1,<2, this is 2\.0"):
        register({"stranger": plugin(pagedcore_requires=">=1,<2")})


def test_a_plugin_that_fails_to_load_is_named_with_its_remedy(monkeypatch):
    class Broken:
        name = "broken"
        dist = types.SimpleNamespace(name="broken-dist")

        def load(self):
            raise ModuleNotFoundError("No module named 'x'")

    monkeypatch.setattr("pagedcore.plugins.entry_points", lambda group: [Broken()])
    with pytest.raises(PluginError) as error:
        load_plugins()
    text = str(error.value)
    assert "plugin 'broken' from broken-dist failed to load: ModuleNotFoundError" in text
    assert "--disable-plugin broken" in text
    load_plugins(["broken"])
