"""docs/models.md: what models there are, by a run of the model kit over every family.

    python -m pagedcore.testing.model_table --triton > docs/models.md

`--triton` runs it in Triton's interpreter, too: five minutes in place of half of one.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pagedcore.cache_spec import CacheSpec
from pagedcore.plugins import collect, load_plugins
from pagedcore.testing.model_case import ModelCase

HEAD = """# Models

A checkpoint runs if one of these classes stands in `architectures` of its `config.json`. This
page is printed by

    python -m pagedcore.testing.model_table --triton > docs/models.md

which runs the model kit over every family: logits against `transformers`, on a tiny random
checkpoint, of prompts whole and in chunks, decoded, side by side, with scattered and whole
caches, and with a cached prefix; and config.json files that lie. In float32 logits are equal
within 1e-4; in 16 bits, errors are at most twice those of `transformers` itself. Of encoders, the
hidden states that vectors are pooled from are compared, or the scores, of prompts alone and side by
side. Your plugin gets the same from `pagedcore plugins test NAME`: see [plugins.md](plugins.md).

Any other causal model of `transformers` runs through its own code over our cache, slower: by
default where no class below has its name, and with `--model-impl transformers`.

*Cache* is what layers keep of the past: *all* of it, a *window* that is let go behind, a *latent*
vector in place of keys and values, or *none*. [Formats](quantization.md) apply to *linear*
layers, and to *experts* where a format has them. *Triton* is our kernels in Triton's interpreter,
in float32 and, since that cannot multiply bfloat16, float16.
"""

HEADINGS = ("architecture", "models", "cache", "formats", "float32", "bfloat16")


def main(arguments: list[str]) -> int:
    """Print the page. The status is 1 if a family fails."""
    interpreted_too = "--triton" in arguments
    if interpreted_too:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    failed = 0
    headings = [*HEADINGS, *(["Triton"] if interpreted_too else []), "notes"]
    print(HEAD)
    print(_line(headings))
    print("|" + "---|" * len(headings))
    manager = load_plugins()
    offered = collect(manager, "pagedcore_models")
    for architecture, case in sorted(collect(manager, "pagedcore_model_cases").items()):
        results = list(_results(architecture, offered[architecture], case, interpreted_too))
        failed += sum(result != "equal" for result in results)
        cells = [f"`{architecture}`", case.family, *_look(offered[architecture], case)]
        print(_line([*cells, *results, case.notes]), flush=True)
    return 1 if failed else 0


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def _results(architecture: str, load: Any, case: ModelCase, interpreted_too: bool) -> Iterator[str]:
    """One word for each column of the kit's."""
    from pagedcore.testing.model_kit import Backend, interpreted, model_checks

    makers = collect(load_plugins(), "pagedcore_backends")
    columns = [
        Backend(name="torch", make=makers["torch"], dtypes=(dtype,))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    if interpreted_too:
        columns.append(interpreted("triton", makers["triton"]))
    for backend in columns:
        result = "equal"
        for check in model_checks(architecture, load, case, [backend]):
            try:
                check()
            except Exception as error:
                print(f"{check}: {type(error).__name__}: {error}", file=sys.stderr)
                result = "**fails**"
        yield result


def _look(load: Any, case: ModelCase) -> Iterator[str]:
    """What a model of the case keeps of the past, and what a format can apply to."""
    from pagedcore.execution.checkpoint import Checkpoint
    from pagedcore.execution.model import ModelBuild
    from pagedcore.execution.model_config import complete_config
    from pagedcore.execution.torch_ops import TorchOps
    from pagedcore.testing.tiny_models import save_tiny_model

    watched = _Watched()
    with tempfile.TemporaryDirectory(prefix="pagedcore-model-table-") as name:
        save_tiny_model(Path(name), case.config, reference=case.reference)
        checkpoint = Checkpoint(Path(name))
        model = load()(
            ModelBuild(
                config=complete_config(checkpoint.config, load()),
                weights=checkpoint.shapes(torch.float32),
                quantizer=watched,
                ops=TorchOps("cpu"),
                dtype=torch.float32,
                device=torch.device("meta"),
                max_positions=256,
            )
        )
    yield ", ".join(dict.fromkeys(_kind(spec) for spec in model.cache_specs))
    yield ", ".join(watched.asked)


def _kind(spec: CacheSpec | None) -> str:
    if spec is None:
        return "none"
    if spec.latent:
        return "latent"
    return "all" if spec.window is None else "window"


class _Watched:
    """A quantizer that keeps weights as they are, and notes what it is asked for."""

    name = "none"

    def __init__(self) -> None:
        from pagedcore.execution.quantizer import Unquantized

        self._plain = Unquantized()
        self.asked: Mapping[str, None] = {}

    def linear(self, *arguments: Any, **options: Any) -> Any:
        """See `Quantizer.linear`."""
        self.asked = {**self.asked, "linear": None}
        return self._plain.linear(*arguments, **options)

    def experts(self, *arguments: Any, **options: Any) -> Any:
        """See `Quantizer.experts`."""
        self.asked = {**self.asked, "experts": None}
        return self._plain.experts(*arguments, **options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
