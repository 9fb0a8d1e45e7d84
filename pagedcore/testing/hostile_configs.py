"""Configs that lie about a model: refused before anything is read or allocated."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pagedcore.errors import ConfigError, ModelError, PluginError
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.model import Model, ModelBuild
from pagedcore.execution.model_config import complete_config
from pagedcore.execution.quantizer import Unquantized
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.drawn_checkpoint import save_drawn_checkpoint
from pagedcore.testing.model_case import ModelCase
from pagedcore.testing.tiny_models import save_tiny_model

MOST_NAMED = 8


def check_lies(architecture: str, load: Callable[[], type[Model]], case: ModelCase) -> str:
    """Change each number of a config.json in turn, to another and to what is no number.

    What comes of it may be a model, where the number is no size, or a ModelError; raises
    PluginError for anything else. Models are built of shapes alone, as at the beginning of a start.
    """
    with tempfile.TemporaryDirectory(prefix="pagedcore-model-kit-") as name:
        folder = Path(name)
        if case.reference:
            save_tiny_model(folder, case.config, reference=case.reference)
        else:
            config = {"architectures": [architecture], **case.config}
            save_drawn_checkpoint(folder, config, load(), torch.float32)
        honest = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        checkpoint = Checkpoint(folder)
    _build(load(), checkpoint)
    complaints, num_lies, num_refused = [], 0, 0
    for what, config in lies_about(honest):
        num_lies += 1
        checkpoint.config = config
        try:
            _build(load(), checkpoint)
        except (ModelError, ConfigError):
            num_refused += 1
        except Exception as error:
            complaints.append(f"{what} raises {type(error).__name__}: {error!s:.60}")
    if complaints:
        shown = "; ".join(complaints[:MOST_NAMED])
        raise PluginError(f"{len(complaints)} configs that lie are not refused properly: {shown}")
    return f"{num_refused} of {num_lies} lies refused, the others change no shape"


def lies_about(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each number of a config, also in objects within it, with another value in its place."""
    for field, value in config.items():
        if isinstance(value, Mapping):
            for what, inner in lies_about(value):
                yield f"{field}.{what}", {**config, field: inner}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            for lie in (0, -1, 2 * value + 1, 10**9, 1e400, str(value), [value], True):
                yield f"{field}={lie!r}", {**config, field: lie}
            yield f"{field} left out", {k: v for k, v in config.items() if k != field}


def _build(model_class: type[Model], checkpoint: Checkpoint) -> None:
    model_class(
        ModelBuild(
            config=complete_config(checkpoint.config, model_class),
            weights=checkpoint.shapes(torch.float32),
            quantizer=Unquantized(),
            ops=TorchOps("cpu"),
            dtype=torch.float32,
            device=torch.device("meta"),
            max_positions=256,
        )
    )
    checkpoint.check_all_taken()
