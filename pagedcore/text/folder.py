"""Read the JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from pagedcore.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no file.

    Raises ModelError for a file that cannot be read or holds anything but one JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Fetch the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} must hold a JSON object, not {type(value).__name__}. Fetch the model again."
        )
    return value
