"""The model kit: does an architecture compute what transformers computes, in every schedule?

A tiny checkpoint is made and saved by transformers, loaded as an engine would, and its logits are
compared at every token: prompts whole and in chunks, decoded, side by side in mixed steps, with the
cache in scattered blocks and in one piece, and with a prefix that another sequence computed. In
float32 they must be equal, and in 16 bits as good as those of transformers there, within the bounds
of `bounds.py`. Models that make vectors or scores have a kit of their own, `pooled_kit.py`.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagedcore.errors import PluginError
from pagedcore.execution.checkpoint import read_config
from pagedcore.execution.model import Model
from pagedcore.execution.ops import Ops
from pagedcore.testing.bounds import judge_by_itself, judge_by_transformers
from pagedcore.testing.checks import Check
from pagedcore.testing.drawn_checkpoint import save_drawn_checkpoint
from pagedcore.testing.hostile_configs import check_lies
from pagedcore.testing.model_case import ModelCase
from pagedcore.testing.paged_model import PagedModel
from pagedcore.testing.pooled_kit import pooled_checks
from pagedcore.testing.schedules import SCHEDULES, Prompts, make_prompts, whole
from pagedcore.testing.shard_kit import shard_checks
from pagedcore.testing.tiny_models import save_tiny_model

LIES = "refuses configs that lie"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where a model runs, and how much of the kit is worth the time there."""

    name: str
    make: Callable[[str], Ops]
    """As the hook `pagedcore_backends` offers it."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    block_size: int = 4
    lengths: tuple[int, ...] = (37, 5, 1, 18)
    """Of the prompts."""

    schedules: tuple[str, ...] = tuple(SCHEDULES)
    variants: bool = True
    """Whether a case's variants run, too."""


def interpreted(name: str, make: Callable[[str], Ops]) -> Backend:
    """A backend of Triton kernels in Triton's interpreter, which takes a second for a step.

    float16 stands for bfloat16, which the interpreter cannot multiply.
    """
    return Backend(
        name=name,
        make=make,
        dtypes=(torch.float32, torch.float16),
        block_size=16,
        lengths=(18, 5),
        schedules=("batched",),
        variants=False,
    )


def model_checks(
    architecture: str,
    load: Callable[[], type[Model]],
    case: ModelCase,
    backends: Sequence[Backend],
) -> Iterator[Check]:
    """What one architecture promises: its case and each variant, in each type on each backend;
    that shards of it are the whole; and that it refuses a config.json that lies.
    """
    subject = f"model {architecture}"
    yield Check(subject, LIES, partial(check_lies, architecture, load, case))
    if case.task != "generate" or case.embeds:
        yield from pooled_checks(architecture, load, case, backends)
    if case.task != "generate":
        return
    yield from shard_checks(architecture, load, case)
    for backend in backends:
        variants = {"": {}, **(case.variants if backend.variants else {})}
        for variant, fields in variants.items():
            for dtype in backend.dtypes:
                words = [variant, str(dtype).removeprefix("torch."), backend.name]
                yield Check(
                    subject,
                    ", ".join(filter(None, words)),
                    partial(check_model, architecture, load, case, fields, dtype, backend),
                )


def check_model(
    architecture: str,
    load: Callable[[], type[Model]],
    case: ModelCase,
    fields: Mapping[str, Any],
    dtype: torch.dtype,
    backend: Backend,
) -> str:
    """Run every schedule; raise PluginError naming those whose logits are off, and by how much.

    Returns how large the largest error was, and what it was an error from.
    """
    prompts = make_prompts(backend.lengths, int(case.config["vocab_size"]))
    with tempfile.TemporaryDirectory(prefix="pagedcore-model-kit-") as name:
        folder = Path(name)
        if case.reference:
            reference = save_tiny_model(
                folder, case.config, dtype=dtype, reference=case.reference, **fields
            )
            found = read_config(folder)["architectures"][0]
            if found != architecture:
                raise PluginError(f"its case is one of {found}: check `model_type`")
            judge = judge_by_transformers(lambda model: _logits(model, prompts), reference, dtype)
        else:
            config = {"architectures": [architecture], **case.config, **fields}
            save_drawn_checkpoint(folder, config, load(), dtype)
            judge = judge_by_itself(whole(PagedModel(folder, load()), prompts), dtype)
        model = PagedModel(
            folder, load(), ops=backend.make("cpu"), dtype=dtype, block_size=backend.block_size
        )
    errors = {}
    for schedule in backend.schedules:
        model.forget()
        logits = SCHEDULES[schedule](model, prompts)
        errors[schedule] = judge.error([scores.float() for scores in logits])
    off = [f"{name} by {e:.2g}" for name, e in errors.items() if not e <= judge.allowed]
    if off:
        raise PluginError(
            f"its logits differ from {judge.origin} by more than {judge.allowed:.2g}: "
            f"{', '.join(off)}"
        )
    return f"within {max(errors.values()):.1g} of {judge.origin}"


@torch.inference_mode()
def _logits(reference: Any, prompts: Prompts) -> list[Tensor]:
    return [reference(torch.tensor([list(prompt)])).logits[0].float() for prompt in prompts]
