"""A config.json as its model's class reads it."""

from collections.abc import Mapping
from typing import Any

from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.model import Model


def complete_config(config: Mapping[str, Any], model_class: type[Model]) -> Mapping[str, Any]:
    """The fields of a model's text with those of the whole, and the class's own defaults.

    A model of texts and images describes its decoder in `text_config`, which may leave out what is
    usual: a class with a mapping `config_defaults` says what that is. Raises ModelError for a
    `text_config` that is no object.
    """
    defaults: Mapping[str, Any] = getattr(model_class, "config_defaults", {})
    text = ConfigFields(config).section("text_config")
    return {**defaults, **({} if text is None else text.values), **config}
