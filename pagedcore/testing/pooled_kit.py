"""The kit of models that make vectors or scores: are they those of transformers?

A tiny checkpoint is made and saved by transformers, and loaded as an engine would. Hidden states of
every token, which vectors are pooled from, are compared, and of a classifier the scores: prompts
alone, and side by side in one step. A model that tells two texts apart is given two. The bounds are
those of the model kit.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pagedcore.errors import PluginError
from pagedcore.execution.checkpoint import read_config
from pagedcore.execution.pooled_model import task_of
from pagedcore.pooling import Pooling, PoolingInfo
from pagedcore.testing.bounds import Judge, judge_by_transformers
from pagedcore.testing.checks import Check
from pagedcore.testing.model_case import ModelCase
from pagedcore.testing.paged_model import PagedModel
from pagedcore.testing.schedules import make_prompts
from pagedcore.testing.tiny_models import save_tiny_model

if TYPE_CHECKING:
    from pagedcore.execution.model import Model
    from pagedcore.testing.model_kit import Backend

MORE_LENGTHS = (9, 2, 30, 13, 21, 6)
"""Of further prompts of a classifier, so that scores have a median."""

Prompt = tuple[list[int], list[int]]
"""Tokens, and the type of each: 1 for those of a second text."""


def pooled_checks(
    architecture: str,
    load: "Callable[[], type[Model]]",
    case: ModelCase,
    backends: "Sequence[Backend]",
) -> Iterator[Check]:
    """What one architecture promises, beside that it refuses a config.json that lies."""
    headless = case.task == "generate"
    for backend in backends:
        variants: dict[str, Mapping[str, Any]] = {"": {}}
        if backend.variants and not headless:
            variants |= case.variants
        for variant, fields in variants.items():
            for dtype in backend.dtypes:
                kind = "vectors" if headless else variant
                words = [kind, str(dtype).removeprefix("torch."), backend.name]
                yield Check(
                    f"model {architecture}",
                    ", ".join(filter(None, words)),
                    partial(check_pooled, architecture, load, case, fields, dtype, backend),
                )


def check_pooled(
    architecture: str,
    load: "Callable[[], type[Model]]",
    case: ModelCase,
    fields: Mapping[str, Any],
    dtype: torch.dtype,
    backend: "Backend",
) -> str:
    """Run prompts alone and together; raise PluginError naming what is off, and by how much.

    A case of a decoder is saved without its head. Returns how large the largest error was.
    """
    is_headless = case.task == "generate"
    with tempfile.TemporaryDirectory(prefix="pagedcore-pooled-kit-") as name:
        folder = Path(name)
        made = save_tiny_model(
            folder,
            case.config,
            dtype=dtype,
            reference="AutoModel" if is_headless else case.reference,
            **fields,
        )
        config = read_config(folder)
        if not is_headless and config["architectures"][0] != architecture:
            found = config["architectures"][0]
            raise PluginError(f"its case is one of {found}: check `model_type` and `reference`")
        model = PagedModel(
            folder,
            load(),
            ops=backend.make("cpu"),
            dtype=dtype,
            block_size=backend.block_size,
            num_rows=len(backend.lengths) + len(MORE_LENGTHS),
            max_positions=int(config["max_position_embeddings"]),
        )
    if task_of(model.model) != case.task:
        raise PluginError(f"the model is made to {task_of(model.model)}; its case says {case.task}")
    prompts = _prompts(backend.lengths, config, case.task == "classify")
    judge = judge_by_transformers(lambda model: _expected(model, case.task, prompts), made, dtype)
    return _compare(model, case.task, prompts, judge)


def _compare(model: PagedModel, task: str, prompts: Sequence[Prompt], judge: Judge) -> str:
    errors = {}
    for way, together in (("alone", False), ("side by side", True)):
        model.forget()
        hidden = _run(model, prompts, together)
        found = _scores(model.model, hidden) if task == "classify" else hidden
        errors[way] = judge.error([part.float() for part in found])
    off = [f"{way} by {error:.2g}" for way, error in errors.items() if not error <= judge.allowed]
    if off:
        what = "scores" if task == "classify" else "hidden states"
        raise PluginError(
            f"its {what} differ from {judge.origin} by more than {judge.allowed:.2g}: "
            f"{', '.join(off)}"
        )
    return f"within {max(errors.values()):.1g} of {judge.origin}"


def _prompts(lengths: Sequence[int], config: Mapping[str, Any], has_scores: bool) -> list[Prompt]:
    """Prompts without padding; each second one is of two texts where the model has two types."""
    more = MORE_LENGTHS if has_scores else ()
    pad = config.get("pad_token_id")
    pairs = int(config.get("type_vocab_size") or 0) > 1
    prompts = []
    for i, tokens in enumerate(make_prompts((*lengths, *more), int(config["vocab_size"]))):
        num_second = len(tokens) // 3 if pairs and i % 2 == 0 else 0
        types = [0] * (len(tokens) - num_second) + [1] * num_second
        prompts.append(([5 if token == pad else token for token in tokens], types))
    return prompts


@torch.inference_mode()
def _expected(reference: Any, task: str, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Hidden states [its tokens, h] or scores [1, n] of each prompt, by transformers."""
    found = []
    for tokens, types in prompts:
        more = {"token_type_ids": torch.tensor([types])} if any(types) else {}
        output = reference(torch.tensor([tokens]), **more)
        found.append(output.logits if task == "classify" else output.last_hidden_state[0])
    return [part.float() for part in found]


def _run(model: PagedModel, prompts: Sequence[Prompt], together: bool) -> list[Tensor]:
    """Hidden states [its tokens, h] of each prompt."""
    rows = range(len(prompts))
    hidden: dict[int, Tensor] = {}
    for some in [list(rows)] if together else [[row] for row in rows]:
        types = {row: prompts[row][1] for row in some}
        hidden |= model.forward({row: prompts[row][0] for row in some}, types)
    return [hidden[row] for row in rows]


@torch.inference_mode()
def _scores(model: "Model", hidden: Sequence[Tensor]) -> list[Tensor]:
    """Scores [1, n] of each prompt."""
    info: PoolingInfo = getattr(model, "pooling", PoolingInfo())
    pooled = torch.stack([_pooled(part, info.scored) for part in hidden])
    return list(model.logits(pooled).split(1))


def _pooled(hidden: Tensor, pooling: Pooling) -> Tensor:
    """One vector [h] of hidden states [n, h]."""
    if pooling == "mean":
        return hidden.mean(0, dtype=torch.float32).to(hidden.dtype)
    return hidden[0] if pooling == "cls" else hidden[-1]
