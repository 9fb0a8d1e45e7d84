"""Read fields of a config.json, which may say anything."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pagedcore.errors import ModelError

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 2**16


class ConfigFields:
    """Typed access to the fields of an object in config.json.

    Every method raises ModelError, with the field's name, what it must be and what it is, for a
    value of another kind, and for a missing field without a default. A field that is null counts
    as missing.
    """

    def __init__(self, values: Mapping[str, Any], within: str = "") -> None:
        """`within` is put in front of the names in errors, such as "rope_parameters."."""
        self.values = values
        self._within = within

    def size(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE
    ) -> int:
        """A whole number, such as a count or a width."""
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"must be a whole number from {least} to {most}")
        return value

    def num_layers(self, name: str = "num_hidden_layers") -> int:
        """A number of layers: what is made for each is not made for as many as a lie says."""
        return self.size(name, most=MAX_LAYERS)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(name, default)
        if not _is_positive(value):
            raise self.error(name, "must be a positive number")
        return float(value)

    def number_or_none(self, name: str, default: float | None = None) -> float | None:
        """As `number`, but null is None: the default is for configs that do not say anything."""
        if name in self.values or default is None:
            return self.number(name) if self.has(name) else None
        return default

    def numbers(self, name: str, count: int) -> list[float]:
        """A list of so many positive numbers."""
        value = self.values.get(name)
        if type(value) is not list or len(value) != count or not all(map(_is_positive, value)):
            raise self.error(name, f"must be a list of {count} positive numbers")
        return [float(item) for item in value]

    def flag(self, name: str, default: bool | None = None) -> bool:
        """A boolean."""
        value = self._get(name, default)
        if type(value) is not bool:
            raise self.error(name, "must be true or false")
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        """One of several names."""
        value = self._get(name, default)
        if value not in allowed:
            raise self.error(name, f"must be one of {', '.join(allowed)}")
        return str(value)

    def sizes(self, name: str) -> list[int]:
        """A list of whole numbers from 0 on; empty where it is missing."""
        value = self._get(name, [])
        if type(value) is not list or any(type(item) is not int or item < 0 for item in value):
            raise self.error(name, "must be a list of whole numbers")
        return value

    def section(self, name: str) -> "ConfigFields | None":
        """An object; None where it is missing."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, "must be an object")
        return ConfigFields(value, f"{self._within}{name}.")

    def has(self, name: str) -> bool:
        """Whether there is a value other than null."""
        return self.values.get(name) is not None

    def error(self, name: str, offence: str) -> ModelError:
        """What to raise about a field."""
        return ModelError(
            f"config.json: {self._within}{name} {offence}, not {self.values.get(name)!r:.80}."
        )

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
