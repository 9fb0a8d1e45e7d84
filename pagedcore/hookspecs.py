"""The plugin contract: every question that pagedcore asks its plugins.

A plugin is a module that an entry point in the group `pagedcore` names. It answers a question by
defining a function of the same name, marked `@pagedcore.hookimpl`, that takes any subset of the
arguments. It may state `pagedcore_requires = ">=1,<2"`.

Hooks that offer parts return a mapping from names to factories. Names are global: two plugins that
offer the same one stop the start with a PluginError naming both. Import heavy packages inside the
factory, so that a plugin which is installed but not selected costs nothing.
"""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pagedcore._markers import hookspec
from pagedcore.errors import PluginError

if TYPE_CHECKING:
    from pagedcore.config import EngineConfig
    from pagedcore.engine.client import EngineClient
    from pagedcore.engine.observers import RequestRecord, StepStats
    from pagedcore.execution.kv_formats import KVFormat
    from pagedcore.execution.logits_processors import Factory
    from pagedcore.execution.ops import Ops
    from pagedcore.execution.quantizer import Quantizer
    from pagedcore.execution.quantizing.writer import WeightWriter, WriterOptions
    from pagedcore.scheduling.policies import Policy
    from pagedcore.sources import Source
    from pagedcore.testing.model_case import ModelCase
    from pagedcore.testing.quantizer_case import QuantizerCase

SPEC_VERSION = (1, 0)
"""Major and minor: a minor version only adds hooks or optional arguments."""


@hookspec
def pagedcore_models() -> Mapping[str, Callable[..., type | None]]:
    """Offer model architectures, by the name in `architectures` of a config.json.

    Asked once, when an engine starts, before any weight is read. A value is called without
    arguments and returns the class: see `pagedcore.execution.model.Model` for what it must do.

    The name "*" is the last resort, for architectures that nobody offers: its value is called with
    the config.json, and returns None where it does not know the architecture either.

    :returns: such as `{"LlamaForCausalLM": load_llama}`.
    """


@hookspec
def pagedcore_model_cases() -> Mapping[str, "ModelCase"]:
    """Offer a tiny configuration of each architecture, to be checked with.

    Asked by `pagedcore plugins test` and by the model kit in `pagedcore.testing`, never by an
    engine. A model without a case is only checked for having a class.

    :returns: such as `{"LlamaForCausalLM": ModelCase(family="Llama", config={...})}`.
    """


@hookspec
def pagedcore_quantizers() -> Mapping[str, Callable[[Mapping[str, Any]], "Quantizer"]]:
    """Offer weight formats, by the name that `quantization=` or the checkpoint selects.

    Asked once, when an engine starts. A factory is called with the checkpoint's
    `quantization_config`, or with an empty mapping when the format is applied while loading.

    :returns: such as `{"int8": Int8Quantizer}`.
    """


@hookspec
def pagedcore_quantizer_cases() -> Mapping[str, "QuantizerCase"]:
    """Offer, for weight formats, a way to store a matrix and the bounds that are promised.

    Asked by `pagedcore plugins test` and by the quantizer kit in `pagedcore.testing`, never by an
    engine. A format without a case is only checked for how its factory is called.

    :returns: such as `{"int8": QuantizerCase(settings={}, max_error=0.01, max_bytes=1.1)}`.
    """


@hookspec
def pagedcore_weight_writers() -> Mapping[str, Callable[["WriterOptions"], "WeightWriter"]]:
    """Offer formats to write weights in, by the name that `pagedcore quantize --format` selects.

    Asked once, by that command, never by an engine. A factory is called with what the command line
    says of bits and groups, and raises ConfigError for what its format does not have. What it
    writes, some plugin's quantizer must read.

    :returns: such as `{"int8": Int8Writer}`.
    """


@hookspec
def pagedcore_backends() -> Mapping[str, Callable[[str], "Ops"]]:
    """Offer implementations of the operations that models are made of.

    Asked once, when an engine starts. A factory is called with the device ("cpu", "cuda:0"); it
    raises ConfigError, saying why, where it cannot run. See `pagedcore.execution.ops.Ops`.

    :returns: such as `{"torch": TorchOps}`.
    """


@hookspec
def pagedcore_kv_formats() -> Mapping[str, Callable[[Any], "KVFormat"]]:
    """Offer ways to keep keys and values, by the name that `kv_cache_dtype=` selects.

    Asked once, when an engine starts, before any weight is read. A factory is called with the
    model's `torch.dtype`. The backend `torch` runs every format by its `encode` and `decode`, in
    each step; another backend has kernels of its own for it, or refuses it by name at the start.
    See `pagedcore.execution.kv_formats.KVFormat`.

    :returns: such as `{"int4": lambda dtype: Int4()}`.
    """


@hookspec
def pagedcore_logits_processors() -> Mapping[str, "Factory"]:
    """Offer changes of the logits, by the names that requests give in `logits_processors`.

    Asked once, when an engine starts. A factory is called with the size of the vocabulary and the
    device, when the first request names it. A processor changes the logits of all sequences that
    ask for it at once, in each of their draws, after bad words, min_tokens and logit_bias and
    before penalties; it costs nothing to others. See
    `pagedcore.execution.logits_processors.LogitsProcessor`.

    :returns: such as `{"no-repeat": NoRepeat}`.
    """


@hookspec
def pagedcore_servers() -> Mapping[str, Callable[["EngineConfig", Any], int]]:
    """Offer mounts, by the name that `pagedcore serve --server` selects.

    Asked when `serve` starts, in the main thread. A mount is called with the engine's and the
    server's configuration, serves until it is told to stop, and returns the exit status.

    :returns: such as `{"asgi": serve_bare}`.
    """


@hookspec
def pagedcore_routes(router: Any, client: "EngineClient") -> None:
    """Add HTTP routes to the OpenAI surface, whatever mounts it.

    Called once for each front end, before it answers anything. `router` is a `fastapi.APIRouter` of
    the plugin's own; `client` reaches the engine. What is added stands behind the same limits and
    keys as our own routes, unless `--auth-exempt-paths` names it. A path that is taken, or any
    other failure, stops the start with a PluginError that names the plugin. The functions run in
    the front end's event loop, and must not block it.
    """


@hookspec
def pagedcore_sources() -> Mapping[str, Callable[[], "Source"]]:
    """Offer places that models come from, by the scheme in front of a model's name.

    Asked once, when a model is looked up. `hf:org/name` asks the source "hf". See
    `pagedcore.sources.Source`.

    :returns: such as `{"hf": HubSource}`.
    """


@hookspec
def pagedcore_policies() -> Mapping[str, Callable[[], "Policy"]]:
    """Offer scheduling policies, by the name that `scheduling_policy=` selects.

    Asked once, when an engine starts. A policy orders the waiting queue and chooses victims; it is
    called in every step that admits or preempts, so it must not look at tokens. See
    `pagedcore.scheduling.policies.Policy`.

    :returns: such as `{"fcfs": FirstComeFirstServed}`.
    """


@hookspec
def pagedcore_step_finished(stats: "StepStats") -> None:
    """Observe a step, after its tokens have been handed out.

    Called once per step, in the engine's thread: what it costs is added to every step. One that
    raises is not called again, and the failure is logged and counted.
    """


@hookspec
def pagedcore_request_finished(record: "RequestRecord") -> None:
    """Observe a sequence that is over: for accounting and audit.

    Called once for each choice of a request, whatever ended it, in the engine's thread, after its
    last token has been handed out: what it costs is added to that step. One that raises is not
    called again, and the failure is logged and counted.
    """


def check_version(requires: str) -> None:
    """Raise PluginError unless SPEC_VERSION satisfies `requires`, such as ">=1,<2" or ""."""
    compare: dict[str, Callable[[tuple[int, int], tuple[int, int]], bool]] = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    for clause in filter(None, (part.strip() for part in requires.split(","))):
        match = re.fullmatch(r"(>=|<=|==|<|>)\s*(\d+)(?:\.(\d+))?", clause)
        if match is None:
            raise PluginError(f"pagedcore_requires is not a version range: {requires!r}.")
        wanted = (int(match[2]), int(match[3] or 0))
        if not compare[match[1]](SPEC_VERSION, wanted):
            have = ".".join(map(str, SPEC_VERSION))
            raise PluginError(f"it needs hook spec {requires}, this is {have}.")
