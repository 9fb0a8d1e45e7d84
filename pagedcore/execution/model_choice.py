"""Which class runs a model folder: the one of its architecture, or a last resort."""

from collections.abc import Mapping, Sequence
from typing import Any

import pluggy

from pagedcore.config import ModelImpl
from pagedcore.errors import ModelError, UnknownNameError
from pagedcore.execution.model import Model
from pagedcore.plugins import collect

LAST_RESORT = "*"
"""What a plugin offers under this name is asked for architectures that nobody offers."""


def choose_model(
    impl: ModelImpl, config: Mapping[str, Any], plugins: pluggy.PluginManager
) -> type[Model]:
    """The class for a config.json, as far as `impl` allows.

    Raises ModelError when config.json names no architecture, or the last resort was asked for and
    does not know it; and UnknownNameError, with the nearest name, when nobody does.
    """
    name = architecture(config)
    offered = collect(plugins, "pagedcore_models")
    last_resort = offered.pop(LAST_RESORT, None)
    if impl == "transformers" or (impl == "auto" and name not in offered):
        found: type[Model] | None = None if last_resort is None else last_resort(config)
        if found is not None:
            return found
        if impl == "transformers":
            raise ModelError(
                f"model_impl=transformers cannot run {name}: transformers is not installed, or has "
                "no such causal language model. Install pagedcore-models[transformers], or use "
                "model_impl=auto."
            )
    if name not in offered:
        raise UnknownNameError("model", name, offered)
    chosen: type[Model] = offered[name]()
    return chosen


def architecture(config: Mapping[str, Any]) -> str:
    """The first of a config.json's architectures. Raises ModelError where there is none."""
    names = config.get("architectures")
    if not isinstance(names, Sequence) or not names or not isinstance(names[0], str):
        raise ModelError("config.json names no architecture: `architectures` is missing or empty")
    return names[0]
