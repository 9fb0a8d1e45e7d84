"""The class that runs a model folder is that of its architecture, or the last resort's."""

import pytest

from pagedcore.errors import ModelError, UnknownNameError
from pagedcore.execution.model_choice import choose_model
from pagedcore.plugins import register


class Mine: ...


class Other: ...


class Plugin:
    """Offers one architecture, and a last resort for another."""

    def __init__(self):
        self.asked = []

    def pagedcore_models(self):
        return {"MineForCausalLM": lambda: Mine, "*": self.last_resort}

    def last_resort(self, config):
        self.asked.append(config["architectures"][0])
        return Other if config.get("model_type") == "other" else None


@pytest.fixture
def plugin():
    import pagedcore

    plugin = Plugin()
    Plugin.pagedcore_models = pagedcore.hookimpl(Plugin.pagedcore_models)
    return plugin


def choose(plugin, impl, name, model_type="other"):
    config = {"architectures": [name], "model_type": model_type}
    return choose_model(impl, config, register({"plugin": plugin}))


def test_an_architecture_that_is_offered_asks_no_last_resort(plugin):
    assert choose(plugin, "auto", "MineForCausalLM") is Mine
    assert choose(plugin, "pagedcore", "MineForCausalLM") is Mine
    assert plugin.asked == []


def test_the_last_resort_takes_what_nobody_offers(plugin):
    assert choose(plugin, "auto", "OtherForCausalLM") is Other


def test_the_last_resort_can_be_asked_first(plugin):
    assert choose(plugin, "transformers", "MineForCausalLM") is Other


def test_what_the_last_resort_does_not_know_is_an_unknown_name(plugin):
    with pytest.raises(UnknownNameError, match="did you mean 'MineForCausalLM'") as error:
        choose(plugin, "auto", "MinForCausalLM", model_type="strange")
    assert "Installed: MineForCausalLM (" in str(error.value)  # and no asterisk


def test_the_last_resort_is_left_out_where_only_own_code_may_run(plugin):
    with pytest.raises(UnknownNameError):
        choose(plugin, "pagedcore", "OtherForCausalLM")
    assert plugin.asked == []


def test_a_last_resort_that_does_not_know_the_model_cannot_be_forced(plugin):
    with pytest.raises(ModelError, match=r"cannot run MineForCausalLM.*model_impl=auto"):
        choose(plugin, "transformers", "MineForCausalLM", model_type="strange")


@pytest.mark.parametrize("names", [None, [], "MineForCausalLM2", [3]])
def test_a_config_without_an_architecture_is_refused(plugin, names):
    with pytest.raises((ModelError, UnknownNameError)):
        choose_model("auto", {"architectures": names}, register({"plugin": plugin}))
