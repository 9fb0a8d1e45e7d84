"""Quantize a model folder into another, tensor by tensor, going on where an earlier run stopped."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor

from pagedcore.errors import ConfigError, ModelError
from pagedcore.execution.checkpoint import Checkpoint, read_config
from pagedcore.execution.loading import longest_context
from pagedcore.execution.model_choice import architecture, choose_model
from pagedcore.execution.model_config import complete_config
from pagedcore.execution.quantizing.balance import Balance
from pagedcore.execution.quantizing.calibration import Report, Runner, balance_by_text
from pagedcore.execution.quantizing.layers import WEIGHT, Layers
from pagedcore.execution.quantizing.shards import (
    Shard,
    copy_files,
    is_whole,
    plan_shards,
    write_index,
    write_json,
    write_tensors,
)
from pagedcore.execution.quantizing.writer import WeightWriter
from pagedcore.execution.safetensors_file import read_header
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.execution.weight_reader import WeightReader

MANIFEST = ".pagedcore-quantize.json"
"""Tells whose files are in a folder: a digest of all that decides their bytes."""

SCALES = ".pagedcore-scales.safetensors"
"""Scales from a calibration text, until all files are written."""

_COPIED = (".json", ".jinja", ".model", ".txt", ".md")
_VERSION = 2  # of what is written for the same settings

Progress = Callable[[str], AbstractContextManager[Report]]
"""Shows what is done, and how far it has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be made of what."""

    source: Path
    output: Path
    writer: WeightWriter
    device: torch.device
    max_shard_bytes: int
    calibration: Sequence[int] = ()
    """Tokens of a text to find scales with; none for plain rounding."""

    plugins: pluggy.PluginManager
    progress: Progress


@dataclass(slots=True)
class Outcome:
    """What a run did."""

    num_layers: int = 0
    num_balanced: int = 0
    """Of the layers: those whose columns were scaled."""

    num_bytes: int = 0
    """Of the original's tensors."""

    num_written: int = 0
    """Bytes of the files with tensors."""

    reused: list[str] = field(default_factory=list)
    """Files that an earlier run had written."""


def quantize(job: Job) -> Outcome:
    """Write the folder; raises ConfigError or ModelError, before anything is written if it can."""
    checkpoint = Checkpoint(job.source)
    _check_source(job, checkpoint)
    runner = _runner(job, checkpoint)
    layers = runner.find_layers()
    _check_layers(job, checkpoint, layers)
    config = job.writer.config(layers.kept)
    shards = plan_shards(checkpoint.stored, job.max_shard_bytes)
    _claim(job, _digest(job, checkpoint, config))
    balance = _balance(job, runner, layers)
    outcome = Outcome(
        num_layers=len(layers.names),
        num_balanced=len(balance.columns),
        num_bytes=checkpoint.num_bytes,
    )
    with (
        job.progress("quantize") as report,
        closing(WeightReader(job.device, checkpoint.stored.values())) as reader,
    ):
        done = 0
        for shard in shards:
            path = job.output / shard.file
            if is_whole(path):
                outcome.reused.append(shard.file)
                done += sum(checkpoint.stored[name].num_bytes for name in shard.names)
                report(done, checkpoint.num_bytes)
                continue
            tensors: dict[str, Tensor] = {}
            for name in shard.names:
                tensors |= _convert(name, checkpoint, layers, balance, job.writer, reader)
                done += checkpoint.stored[name].num_bytes
                report(done, checkpoint.num_bytes)
            write_tensors(path, tensors)
    _finish(job, shards, {**read_config(job.source), "quantization_config": dict(config)})
    outcome.num_written = sum((job.output / shard.file).stat().st_size for shard in shards)
    return outcome


@torch.inference_mode()
def _convert(
    name: str,
    checkpoint: Checkpoint,
    layers: Layers,
    balance: Balance,
    writer: WeightWriter,
    reader: WeightReader,
) -> dict[str, Tensor]:
    """What becomes of one tensor, on the host."""
    stored = reader.read(checkpoint.stored[name])
    if stored.is_floating_point() and not stored.isfinite().all():
        raise ModelError(f"{name!r} holds NaN or infinity. Fetch the model again.")
    tensor = balance.apply(name, stored)
    layer = name.removesuffix(WEIGHT)
    if name.endswith(WEIGHT) and layer in layers.names:
        written = writer.write(tensor.float())
        return {f"{layer}.{what}": value.cpu() for what, value in written.items()}
    return {name: tensor.to(stored.dtype).cpu()}


def _runner(job: Job, checkpoint: Checkpoint) -> Runner:
    kind = choose_model("auto", checkpoint.config, job.plugins)
    config = complete_config(checkpoint.config, kind)
    positions = longest_context(config)
    return Runner(
        checkpoint,
        config,
        kind,
        TorchOps(str(job.device)),
        checkpoint.dtype,
        job.device,
        positions,
    )


def _check_source(job: Job, checkpoint: Checkpoint) -> None:
    settings = checkpoint.config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise ModelError(
            f"{job.source} is quantized already, as {method!r:.40}: rounding twice loses more than "
            "once. Take the model that it was made from."
        )
    if job.calibration and not job.writer.balances:
        raise ConfigError(
            "--calibration changes nothing in this format, whose scales follow from the weights "
            "alone: leave it out, or take awq, gptq or int8"
        )
    if job.output.resolve() == job.source.resolve():
        raise ConfigError(f"--output must be another folder than the model's own, {job.source}")


def _check_layers(job: Job, checkpoint: Checkpoint, layers: Layers) -> None:
    if not layers.groups:
        raise ConfigError(
            f"{architecture(checkpoint.config)} has no layers that a weight format can store here: "
            "their matrices are transposed, or the model runs through transformers' code"
        )
    for name in sorted(layers.names):
        rows, columns = checkpoint.stored[name + WEIGHT].shape
        job.writer.check(name, rows, columns)


def _claim(job: Job, digest: str) -> None:
    """Make the output folder ours; raises ConfigError where it is somebody else's."""
    path = job.output / MANIFEST
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if isinstance(found, dict) and found.get("settings") == digest:
            return
        raise ConfigError(
            f"{job.output} holds a model that was quantized with other settings, or from another "
            "model: choose another --output, or remove it"
        )
    try:
        if job.output.exists() and (not job.output.is_dir() or any(job.output.iterdir())):
            raise ConfigError(f"{job.output} is there already, and not empty: choose another")
        job.output.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": digest})
    except OSError as error:
        raise ConfigError(f"{job.output} cannot be written: {error.strerror or error}") from error


def _digest(job: Job, checkpoint: Checkpoint, config: object) -> str:
    """Of everything that decides what is written."""
    files = {tensor.path for tensor in checkpoint.stored.values()}
    stated: list[Any] = [
        _VERSION,
        config,
        job.max_shard_bytes,
        list(job.calibration),
        dict(checkpoint.config),
        [(name, list(t.shape), str(t.dtype)) for name, t in checkpoint.stored.items()],
        sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files),
    ]
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _balance(job: Job, runner: Runner, layers: Layers) -> Balance:
    """Scales of the calibration text: those of an earlier run, if it came so far."""
    if not job.calibration:
        return Balance()
    path = job.output / SCALES
    if is_whole(path):
        with closing(WeightReader(torch.device("cpu"), [])) as reader:
            stored = read_header(path)
            return Balance.of({name: reader.read(tensor) for name, tensor in stored.items()})
    with job.progress("read the text") as first, job.progress("find scales") as second:
        balance = balance_by_text(runner, layers, job.calibration, job.writer, (first, second))
    write_tensors(path, balance.tensors())
    return balance


def _finish(job: Job, shards: Sequence[Shard], config: dict[str, Any]) -> None:
    """Write what makes the folder a model: last, so that no half of one looks like it."""
    copy_files(job.source, job.output, _COPIED)
    write_index(job.output, shards)
    write_json(job.output / "config.json", config)
