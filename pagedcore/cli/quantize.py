"""`pagedcore quantize`: make a checkpoint of few bits from one of 16."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pagedcore.errors import ConfigError
from pagedcore.plugins import choose, collect, load_plugins
from pagedcore.sources import find_model

logger = logging.getLogger(__name__)

MAX_TOKENS = 16384
"""Of a calibration text: more changes little."""

GIB = 1 << 30


def quantize(
    model: str,
    *,
    format: str,
    output: Path,
    bits: int | None = None,
    group_size: int | None = None,
    calibration: Path | None = None,
    calibration_tokens: int = MAX_TOKENS,
    max_shard_gib: float = 4.0,
    device: str = "auto",
    revision: str | None = None,
) -> int:
    """Make a checkpoint of few bits; one that was interrupted goes on where it stopped.

    Parameters
    ----------
    model
        A folder of 16-bit weights, a GGUF file, `hf:org/name`, `modelscope:org/name` or an alias.
    format
        How weights are stored, as `pagedcore plugins list` shows: fp8, int8, gptq, awq and others.
    output
        The folder to make.
    bits
        Of a weight, where the format has a choice.
    group_size
        Inputs that share a scale, where the format has a choice; -1 is all of them.
    calibration
        A text file, as near as can be to what the model will read. Inputs that are large in it get
        scales, so that rounding harms them less. Without it, weights are rounded to the nearest.
    calibration_tokens
        Most tokens of the text that are read.
    max_shard_gib
        Bytes of the original that become one file.
    device
        Where it is computed: auto, cpu, cuda or cuda:N.
    revision
        Of a model of a hub.
    """
    if calibration_tokens < 1:
        raise ConfigError(f"--calibration-tokens must be at least 1, not {calibration_tokens}")
    if not max_shard_gib > 0:
        raise ConfigError(f"--max-shard-gib must be above 0, not {max_shard_gib}")
    plugins = load_plugins()
    make = choose(plugins, "pagedcore_weight_writers", format)
    from pagedcore.execution.devices import find_device
    from pagedcore.execution.quantizing.job import Job
    from pagedcore.execution.quantizing.job import quantize as run
    from pagedcore.execution.quantizing.writer import WriterOptions

    writer = make(WriterOptions(bits=bits, group_size=group_size))
    text = None if calibration is None else _read(calibration)
    folder = find_model(model, collect(plugins, "pagedcore_sources"), revision=revision)
    outcome = run(
        Job(
            source=folder,
            output=output.expanduser(),
            writer=writer,
            device=find_device(device),
            max_shard_bytes=max(1, int(max_shard_gib * GIB)),
            calibration=() if text is None else _tokens(folder, text, calibration_tokens),
            plugins=plugins,
            progress=_progress,
        )
    )
    if outcome.reused:
        print(f"files that were there already: {len(outcome.reused)}")
    balanced = f", {outcome.num_balanced} of them scaled" if calibration else ""
    print(f"layers: {outcome.num_layers}{balanced}")
    print(f"size: {outcome.num_bytes / GIB:.3f} GiB, now {outcome.num_written / GIB:.3f} GiB")
    print(f"written to {output}")
    return 0


def _read(path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--calibration {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--calibration {path} is no text in UTF-8: {error}") from error
    if not text.strip():
        raise ConfigError(f"--calibration {path} is empty")
    return text


def _tokens(folder: Path, text: str, count: int) -> list[int]:
    from pagedcore.text.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder).encode(text)[:count]


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while the block runs, or one log line where stderr is no terminal."""
    if not sys.stderr.isatty():
        logger.info("%s", what)
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = TextColumn("{task.description:14}"), BarColumn(), TaskProgressColumn(), Remaining()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
