"""Which layers a quantization_config leaves alone.

An entry is a layer's name, or part of one between dots, such as `lm_head`, `model.layers.0` or
`mlp.gate`; behind `re:` it is a regular expression that a name begins with.
"""

import re
from collections.abc import Sequence

from pagedcore.errors import ModelError
from pagedcore.execution.config_fields import ConfigFields

MAX_ENTRIES = 100_000
MAX_PATTERN = 500
_MAX_REPEATS = 4  # each multiplies the time that a match may take by the length of a name


class Modules:
    """The entries of the first of some fields that is there."""

    def __init__(self, fields: ConfigFields, *names: str) -> None:
        """Raises ModelError, naming the field, for anything but a list of names and patterns."""
        self._names: set[str] = set()
        self._patterns: list[re.Pattern[str]] = []
        self._field = next((name for name in names if fields.has(name)), names[0])
        entries = fields.values.get(self._field) or []
        if type(entries) is not list or len(entries) > MAX_ENTRIES:
            raise fields.error(self._field, "must be a list of layers")
        for entry in entries:
            if not isinstance(entry, str):
                raise fields.error(self._field, "must hold names")
            if entry.startswith("re:"):
                self._patterns.append(_compile(entry.removeprefix("re:"), self._field))
            else:
                self._names.add(entry)

    def holds(self, name: str) -> bool:
        """Whether the layer `name` is one of them."""
        steps = name.split(".")
        spans = (
            ".".join(steps[first:last])
            for first in range(len(steps))
            for last in range(first + 1, len(steps) + 1)
        )
        if any(span in self._names for span in spans):
            return True
        return any(pattern.match(name) for pattern in self._patterns)

    def holds_all(self, names: Sequence[str]) -> bool:
        """Whether the parts of one matrix are; raises ModelError when some are and some are not."""
        kept = [name for name in names if self.holds(name)]
        if kept and len(kept) < len(names):
            raise ModelError(
                f"config.json: quantization_config.{self._field} holds {', '.join(kept)}, but not "
                f"all of {', '.join(names)}, which are multiplied as one matrix. Quantize the "
                "model again with all of them, or none, left alone."
            )
        return bool(kept)


def _compile(pattern: str, field: str) -> re.Pattern[str]:
    """The pattern, if matching it takes no longer than its length lets expect."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    nested = re.search(r"\)[*+?{]|\\\d|\(\?", pattern)
    if len(pattern) <= MAX_PATTERN and repeats <= _MAX_REPEATS and not nested:
        try:
            return re.compile(pattern)
        except re.error:
            pass
    raise ModelError(
        f"config.json: quantization_config.{field} has the pattern {pattern!r:.80}, which is none "
        f"of the simple ones that are read: at most {_MAX_REPEATS} repeats, none of a group."
    )
