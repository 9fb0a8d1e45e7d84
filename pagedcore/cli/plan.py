"""`pagedcore plan`: what a model would take of a device, and what it could serve there."""

import json as text
import re
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pagedcore.cli.flags import command, engine_parameters
from pagedcore.config import DEFAULT_MODEL, EngineConfig, Usage
from pagedcore.errors import ConfigError
from pagedcore.plugins import collect, load_plugins
from pagedcore.sources import find_config

if TYPE_CHECKING:
    from pagedcore.cli.plan_reasons import Setting
    from pagedcore.execution.plan import Gpu, Plan

_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@command(engine_parameters())
def plan(
    model: str = DEFAULT_MODEL,
    *,
    gpu: str | None = None,
    usage: Usage = "serve",
    json: bool = False,
    **options: Any,
) -> int:
    """Tell what a model would take of a device, from its config.json alone.

    The status is 1 if it does not fit.

    Parameters
    ----------
    model
        A folder that holds a config.json or its path, `hf:org/name`, or what `serve` takes.
    gpu
        Memory of the GPU to plan for, such as 24GiB or A100:80GiB; by default this machine's, or
        the CPU.
    usage
        `serve`, or `offline` for the Python API, which has larger steps.
    json
        Print one JSON object.
    """
    config = EngineConfig.from_options(model=model, **options)
    size = None if gpu is None else parse_gpu(gpu)  # complains before torch is imported
    if gpu is not None and config.execution.device == "cpu":
        raise ConfigError("--gpu and --device cpu contradict each other: leave one of them out")
    plugins = load_plugins(config.execution.disable_plugin, config.execution.only_plugin)
    path = Path(model).expanduser()
    folder = (
        path.parent
        if path.name == "config.json" and path.is_file()
        else find_config(model, collect(plugins, "pagedcore_sources"), config.model.revision)
    )

    from pagedcore.cli.plan_reasons import explain
    from pagedcore.execution.plan import Gpu
    from pagedcore.execution.planning import plan_engine

    device = Gpu(total_bytes=size[1], is_a100=size[0]) if size else _gpu_here(config)
    found, resolved = plan_engine(config, folder, plugins, gpu=device, usage=usage)
    settings = explain(found, resolved, options, usage)
    if json:
        told = {"model": model, "fits": found.fits, **asdict(found)}
        print(text.dumps({**told, "settings": [asdict(setting) for setting in settings]}, indent=2))
    else:
        _show(Console(highlight=False), model, found, settings)
    return 0 if found.fits else 1


def parse_gpu(given: str) -> tuple[bool, int]:
    """Whether a GPU is an A100, and its bytes. Raises ConfigError, saying what is allowed."""
    match = re.fullmatch(r"(?:([\w -]+):)?(\d*\.?\d+) ?([MGT]i?B)", given)
    size = int(Fraction(match[2]) * _UNITS[match[3]]) if match else 0
    if match is None or size < 1:
        raise ConfigError(
            f"gpu must be an amount of memory, such as 24GiB, 80GB or A100:80GiB, not {given!r}"
        )
    return "A100" in (match[1] or "").upper(), size


def _gpu_here(config: EngineConfig) -> "Gpu | None":
    """The GPU that `serve` would take on this machine; None for its CPU."""
    import torch

    from pagedcore.execution.devices import find_device, total_bytes
    from pagedcore.execution.plan import Gpu

    device = find_device(config.execution.device)
    if device.type != "cuda":
        return None
    is_a100 = "A100" in torch.cuda.get_device_name(device)
    return Gpu(total_bytes=total_bytes(device), is_a100=is_a100)


def _show(console: Console, model: str, plan: "Plan", settings: "Sequence[Setting]") -> None:
    kind = f"{plan.architecture}, {plan.dtype}"
    if plan.quantization != "none":
        kind += f", weights {plan.quantization}"
    console.print(f"[bold]{escape(model)}[/]: {escape(kind)}, backend {escape(plan.backend)}\n")
    console.print(_memory(plan))
    if plan.groups:
        console.print(_cache(plan))
        console.print(_concurrency(plan))
    console.print(_settings(settings))
    for note in plan.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    _show_verdict(console, plan)


def _memory(plan: "Plan") -> Table:
    table = Table("memory", "GiB", "how it is known", title="Where the memory goes")
    table.columns[1].justify = "right"
    rows = [("weights", plan.weight_bytes, "the model's tensors, counted")]
    if plan.device == "gpu":
        step = f"estimate: the largest step, of {plan.max_num_batched_tokens} tokens"
        rows.append(("step", plan.step_bytes, step))
        rows.append(("outside", plan.outside_bytes, "set aside: context, kernels, graphs"))
    blocks = f"{plan.num_blocks} blocks of {plan.block_size} tokens"
    rows.append(("cache", plan.cache_bytes, blocks))
    for name, size, how in rows:
        table.add_row(name, _gib(size), how)
    table.add_section()
    rest = f"of {_gib(plan.total_bytes)} on the device"
    table.add_row("for this engine", _gib(plan.requested_bytes), rest)
    rows_of = f"tokens and tables of {plan.max_num_seqs} rows, beside the cache"
    table.add_row("rows", _gib(plan.row_bytes), rows_of)
    return table


def _cache(plan: "Plan") -> Table:
    title = f"The cache, {plan.cache_dtype}: {plan.kv_bytes_per_token} bytes per token"
    table = Table("layers", "heads", "head size", "looks back", "bytes per token", title=title)
    for group in plan.groups:
        heads = "latent" if group.is_latent else str(group.num_kv_heads)
        window = "to the start" if group.window is None else f"{group.window} tokens"
        table.add_row(
            str(group.num_layers), heads, str(group.head_dim), window, str(group.bytes_per_token)
        )
    return table


def _concurrency(plan: "Plan") -> Table:
    table = Table("tokens each", "at a time", "what binds", title="Sequences at a time")
    for length, count in plan.concurrency_by_length.items():
        limit = "max_num_seqs" if count >= plan.max_num_seqs else "memory"
        table.add_row(str(length), str(count), limit)
    return table


def _settings(settings: "Sequence[Setting]") -> Table:
    table = Table("setting", "value", "from", "why", title="Settings")
    table.columns[0].no_wrap = True
    for setting in settings:
        cells = (setting.name, str(setting.value), setting.origin, setting.why)
        table.add_row(*map(escape, cells))
    return table


def _show_verdict(console: Console, plan: "Plan") -> None:
    if plan.problem is not None:
        console.print(f"[red]does not fit[/]: {escape(plan.problem)}", soft_wrap=True)
        for remedy in plan.remedies:
            line = f"  {remedy.change}: {remedy.result}"
            console.print(escape(line), soft_wrap=True)
        return
    held = "" if plan.concurrency is None else f" ({plan.concurrency:.1f} in the cache)"
    count = plan.concurrency_by_length[plan.max_model_len]
    console.print(
        f"[green]fits[/]: {count} sequences of {plan.max_model_len} tokens at a time{held}; "
        f"{plan.limit} binds",
        soft_wrap=True,
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
