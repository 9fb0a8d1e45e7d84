"""What a model, or its folder, says about the vectors that it makes."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pagedcore.errors import ModelError
from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.model import Model
from pagedcore.pooling import Pooling, PoolingInfo, Task

_MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


class PooledModel(Model, Protocol):
    """A model that was made for vectors or scores. A `Model` without these generates text.

    One whose `cache_specs` are all None keeps nothing of the past: it sees each prompt whole, in
    one step, and cannot generate. `logits` of one with a classifier maps pooled hidden states to
    the scores of its labels.
    """

    task: Task
    """What it was made for."""

    pooling: PoolingInfo
    """What it would do without a folder that says more; `scored` and `num_labels` are its own."""

    max_length: int
    """Longest prompt that it has positions for."""


def task_of(model: Model) -> Task:
    """What a model was made for."""
    task: Task = getattr(model, "task", "generate")
    return task


def longest_prompt(model: Model, own: int) -> int:
    """`own`, or less where the model has fewer positions than its config.json seems to say."""
    return min(own, int(getattr(model, "max_length", own)))


def pooling_of(model: Model, config: Mapping[str, Any], folder: Path) -> PoolingInfo:
    """What vectors a model makes: its own way, unless its folder says more.

    A folder of sentence-transformers has a modules.json, which names the pooling and whether
    vectors are normalized. Raises ModelError for one that asks for what is not built.
    """
    info: PoolingInfo = getattr(model, "pooling", PoolingInfo())
    fields = ConfigFields(config)
    size = config.get("hidden_size", config.get("n_embd"))
    dimensions = tuple(fields.sizes("matryoshka_dimensions"))
    info = replace(
        info,
        size=size if type(size) is int else 0,
        is_matryoshka=bool(dimensions) or fields.flag("is_matryoshka", False),
        dimensions=dimensions,
    )
    modules = _read_json(folder / "modules.json")
    return info if modules is None else _of_modules(info, modules, folder)


def _of_modules(info: PoolingInfo, modules: Any, folder: Path) -> PoolingInfo:
    if not isinstance(modules, list) or not all(isinstance(m, Mapping) for m in modules):
        raise ModelError(f"{folder / 'modules.json'} must be a list of objects")
    normalize = False
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            info = replace(info, pooling=_pooling(folder, str(module.get("path", ""))))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ModelError(
                f"{folder / 'modules.json'} asks for a module {kind!r:.80}; Transformer, "
                "Pooling and Normalize are built. Remove the file to pool hidden states without it."
            )
    return replace(info, normalize=normalize)


def _pooling(folder: Path, name: str) -> Pooling:
    if name in ("", ".", "..") or Path(name).name != name:
        raise ModelError(f"{folder / 'modules.json'}: {name!r:.80} is no folder beside it")
    path = folder / name / "config.json"
    values = _read_json(path)
    if not isinstance(values, Mapping):
        raise ModelError(f"{path} is missing, or no JSON object. Fetch the model again.")
    asked = values.get("pooling_mode")
    modes = [k for k, v in values.items() if k.startswith("pooling_mode_") and v is True]
    if isinstance(asked, str):
        modes = [asked]
    found = _NAMES.get(modes[0], _MODES.get(modes[0])) if len(modes) == 1 else None
    if found is None:
        raise ModelError(
            f"{path} asks for the pooling {', '.join(modes) or 'of nothing'}; one of cls, mean and "
            "lasttoken is built"
        )
    return found


def _read_json(path: Path) -> Any:
    """What a file holds; None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Fetch the model again.") from error
