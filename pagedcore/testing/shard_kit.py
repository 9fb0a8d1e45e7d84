"""The model kit for tensor parallelism: do shards of a model compute what it computes whole?

Ranks are threads that each make and run their share of a tiny checkpoint, on plain torch in
float32. Every rank must get the logits of the whole model, and keep its share of the cache.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.errors import ModelError, PluginError
from pagedcore.execution.divided import divided
from pagedcore.execution.model import Model, ModelBuild
from pagedcore.execution.quantizer import Quantizer
from pagedcore.execution.shard import Shard
from pagedcore.testing.bounds import TOLERANCE
from pagedcore.testing.checks import Check
from pagedcore.testing.drawn_checkpoint import save_drawn_checkpoint
from pagedcore.testing.model_case import ModelCase
from pagedcore.testing.paged_model import PagedModel
from pagedcore.testing.rank_threads import run_ranks
from pagedcore.testing.schedules import SCHEDULES, Prompts, make_prompts
from pagedcore.testing.tiny_models import save_tiny_model

RANKS = (2, 4)
"""Between how many a model is divided."""

LENGTHS = (18, 5)
"""Of the prompts."""

SCHEDULE = "batched"
"""Of `SCHEDULES`: prompts in chunks, beside others that are decoded."""

SHARDS = "shards = whole"


def shard_checks(
    architecture: str, load: Callable[[], type[Model]], case: ModelCase
) -> Iterator[Check]:
    """That an architecture can be divided in each of its configurations, or says that it cannot."""
    for variant, fields in {"": {}, **case.variants}.items():
        test = partial(check_shards, architecture, load, case, fields)
        yield Check(f"model {architecture}", ", ".join(filter(None, [variant, SHARDS])), test)


def check_shards(
    architecture: str,
    load: Callable[[], type[Model]],
    case: ModelCase,
    fields: Mapping[str, Any],
) -> str:
    """Raise PluginError for shards whose logits or caches are not what they should be.

    Returns how large the largest error was, or why there is no such number of ranks.
    """
    model_class = load()
    with tempfile.TemporaryDirectory(prefix="pagedcore-shard-kit-") as name:
        folder = Path(name)
        if case.reference:
            save_tiny_model(folder, case.config, reference=case.reference, **fields)
        else:
            config = {"architectures": [architecture], **case.config, **fields}
            save_drawn_checkpoint(folder, config, model_class, torch.float32)
        return compare_shards(folder, model_class)


def compare_shards(
    folder: Path,
    model_class: type[Model],
    *,
    ranks: Sequence[int] = RANKS,
    make_quantizer: Callable[[], Quantizer] | None = None,
) -> str:
    """The same for the model of a folder."""

    def make(build_class: type[Model]) -> PagedModel:
        return PagedModel(
            folder, build_class, quantizer=make_quantizer() if make_quantizer else None
        )

    whole = make(model_class)
    prompts = make_prompts(LENGTHS, whole.model.vocab_size)
    expected = _logits(whole, prompts)
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    remarks = []
    for size in ranks:

        def run(shard: Shard) -> tuple[Tensor, Sequence[CacheSpec | None]]:
            model = make(shard_of(model_class, shard))
            return _logits(model, prompts), model.model.cache_specs

        try:
            found = run_ranks(size, run)
        except ModelError as error:
            remarks.append(f"not on {size} ranks: {error}")
            continue
        for rank, (logits, specs) in enumerate(found):
            off = float((logits - expected).abs().max())
            if not off <= allowed:
                raise PluginError(
                    f"the logits of rank {rank} of {size} differ from those of the whole by "
                    f"{off:.2g}, more than {allowed:.2g}"
                )
            _check_caches(whole.model.cache_specs, specs, size)
        largest = max(float((logits - expected).abs().max()) for logits, _ in found)
        remarks.append(f"within {largest:.1g} on {size} ranks")
    return "; ".join(remarks)


def shard_of(model_class: type[Model], shard: Shard) -> type[Model]:
    """A class that makes the rank's share of a model, wherever `model_class` makes the whole."""

    def init(self: Any, build: ModelBuild) -> None:
        model_class.__init__(self, divided(build, shard, model_class))

    return type(model_class.__name__, (model_class,), {"__init__": init})


def _logits(model: PagedModel, prompts: Prompts) -> Tensor:
    return torch.cat(SCHEDULES[SCHEDULE](model, prompts))


def _check_caches(
    whole: Sequence[CacheSpec | None], own: Sequence[CacheSpec | None], size: int
) -> None:
    """Raise PluginError unless a rank keeps its share of each layer's kv heads, or one at least."""
    for layer, (of_all, of_rank) in enumerate(zip(whole, own, strict=True)):
        if of_all is None or of_rank is None:
            continue
        expected = max(1, of_all.num_kv_heads // size)
        if of_rank.num_kv_heads != expected:
            raise PluginError(
                f"layer {layer} keeps {of_rank.num_kv_heads} kv heads on one of {size} ranks, "
                f"not {expected}"
            )
