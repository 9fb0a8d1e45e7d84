"""Read the text files of a model folder."""

import json
from pathlib import Path
from typing import Any

from pagedcore.errors import ModelError


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises ModelError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Fetch the model again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no file.

    Raises ModelError for a file that cannot be read or holds anything but one JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}. Fetch the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} must hold a JSON object, not {type(value).__name__}. Fetch the model again."
        )
    return value
