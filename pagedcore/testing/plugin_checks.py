"""All that one plugin promises, as checks: what `pagedcore plugins test` and pytest run.

What can only be made beside a model, such as a server's process, is checked for how it is called.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from pagedcore.errors import ConfigError, PluginError, UnknownNameError
from pagedcore.plugins import collect, load_plugins, register
from pagedcore.testing.checks import Check

if TYPE_CHECKING:
    from pagedcore.execution.ops import Ops
    from pagedcore.testing.model_kit import Backend

INTERPRETED = "triton"
"""The backend that runs on a CPU in Triton's interpreter, if TRITON_INTERPRET is set in time."""


def find_plugin(entries: Iterable[EntryPoint], name: str) -> EntryPoint:
    """The installed plugin of this name, or the only one of a distribution of this name.

    Raises UnknownNameError, with the nearest name.
    """
    by_name = {entry.name: entry for entry in entries}
    if name in by_name:
        return by_name[name]
    of_it = [entry for entry in by_name.values() if entry.dist and entry.dist.name == name]
    if len(of_it) != 1:
        raise UnknownNameError("plugin", name, by_name)
    return of_it[0]


def plugin_checks(
    name: str, plugin: object, *, backends: Sequence[str] = ("torch",), serves: bool = False
) -> Iterator[Check]:
    """What a loaded plugin promises. Models run on the installed `backends` of these names.

    `serves` starts the servers that it offers, which takes half a minute each. Raises PluginError
    for a plugin that does not keep to the spec at all.
    """
    manager = register({name: plugin})
    for hook, check in _SIMPLE.items():
        for offer, factory in collect(manager, hook).items():
            is_last_resort = (hook, offer) == ("pagedcore_models", "*")
            called = partial(_called, _check_last_resort if is_last_resort else check, factory)
            yield Check(f"{_kind(hook)} {offer}", "", called)
    yield from _models(collect(manager, "pagedcore_models"), manager, backends)
    yield from _quantizers(collect(manager, "pagedcore_quantizers"), manager)
    yield from _kv_formats(collect(manager, "pagedcore_kv_formats"))
    yield from _backends(collect(manager, "pagedcore_backends"))
    if serves:
        from pagedcore.testing.mount_kit import mount_checks

        for offer in collect(manager, "pagedcore_servers"):
            yield from mount_checks(offer)


def _kind(hook: str) -> str:
    singular = hook.removeprefix("pagedcore_").replace("policies", "policy")
    return singular.removesuffix("s").replace("_", " ")


def _called(check: Callable[[Callable[..., Any]], str], factory: Any) -> str:
    if not callable(factory):
        raise PluginError(f"a factory is needed, not {factory!r}")
    return check(factory)


def _models(
    offered: Mapping[str, Callable[[], Any]], manager: Any, backends: Sequence[str]
) -> Iterator[Check]:
    cases = collect(manager, "pagedcore_model_cases")
    for architecture in cases:
        if architecture not in offered:
            yield Check(
                f"model {architecture}",
                "",
                partial(_fail, UnknownNameError("model", architecture, offered)),
            )
    if not cases.keys() & offered.keys():
        return
    from pagedcore.testing.model_kit import model_checks

    places = _places(backends)
    for architecture, case in cases.items():
        if architecture in offered:
            yield from model_checks(architecture, offered[architecture], case, places)


def _places(names: Sequence[str]) -> "list[Backend]":
    from pagedcore.testing.model_kit import Backend, interpreted

    installed = collect(load_plugins(), "pagedcore_backends")
    for name in names:
        if name not in installed:
            raise UnknownNameError("backend", name, installed)
    return [
        interpreted(name, installed[name])
        if name == INTERPRETED
        else Backend(name=name, make=installed[name])
        for name in names
    ]


def _quantizers(offered: Mapping[str, Callable[..., Any]], manager: Any) -> Iterator[Check]:
    cases = collect(manager, "pagedcore_quantizer_cases")
    if not cases:
        return
    from pagedcore.testing.quantizer_kit import quantizer_checks

    for name, case in cases.items():
        if name in offered:
            yield from quantizer_checks(name, offered[name], case)
        else:
            error = UnknownNameError("quantizer", name, offered)
            yield Check(f"quantizer {name}", "", partial(_fail, error))


def _kv_formats(offered: Mapping[str, Callable[..., Any]]) -> Iterator[Check]:
    if not offered:
        return
    from pagedcore.testing.kv_format_kit import kv_format_checks

    for name, factory in offered.items():
        if callable(factory):
            yield from kv_format_checks(name, factory)


def _backends(offered: Mapping[str, Callable[[str], "Ops"]]) -> Iterator[Check]:
    for name, make in offered.items():
        if not callable(make):
            continue
        try:
            make("cpu")
        except Exception:
            continue  # its own check tells why
        import torch

        from pagedcore.testing.backend_kit import backend_checks

        slow = name == INTERPRETED  # and cannot multiply bfloat16
        dtypes = (torch.float32, torch.float16 if slow else torch.bfloat16)
        yield from backend_checks(name, make, dtypes, num_shapes=1 if slow else 3)


def _fail(error: Exception) -> str:
    raise error


def _check_model(factory: Callable[[], Any]) -> str:
    model = factory()
    if not isinstance(model, type):
        raise PluginError(f"the factory must return a class, not {model!r}")
    return ""


def _check_last_resort(factory: Callable[[Mapping[str, Any]], Any]) -> str:
    if factory({"architectures": ["NobodysForCausalLM"]}) is not None:
        raise PluginError("the last resort must return None for what it does not know")
    return ""


def _check_backend(factory: Callable[[str], Any]) -> str:
    from pagedcore.execution.ops import Ops

    for device in ("cpu", "cuda:0"):
        try:
            ops = factory(device)
        except ConfigError as error:
            reason = str(error)
            continue
        _check_protocol(ops, Ops)
        return f"runs on {device}"
    return f"cannot run here: {reason}"


def _check_source(factory: Callable[[], Any]) -> str:
    from pagedcore.sources import Source

    _check_protocol(factory(), Source)
    return ""


def _check_policy(factory: Callable[[], Any]) -> str:
    from pagedcore.scheduling.policies import Policy
    from pagedcore.testing.policy_kit import check_policy

    policy = factory()
    _check_protocol(policy, Policy)
    return check_policy(policy)


def _check_processor(factory: Callable[..., Any]) -> str:
    import torch

    from pagedcore.execution.logits_processors import LogitsProcessor

    _check_protocol(factory(100, torch.device("cpu")), LogitsProcessor)
    return ""


def _check_kv_format(factory: Callable[..., Any]) -> str:
    import torch

    from pagedcore.execution.kv_formats import KVFormat

    kv_format = factory(torch.bfloat16)
    if not isinstance(kv_format, KVFormat):
        raise PluginError(f"the factory must return a KVFormat, not {kv_format!r}")
    for name in ("name", "dtype", "max_error"):
        if not hasattr(kv_format, name):
            raise PluginError(f"{type(kv_format).__name__} lacks {name}")
    return f"{kv_format.vector_bytes(128)} bytes of a vector of 128"


def _check_quantizer(factory: Callable[..., Any]) -> str:
    return _check_arguments(factory, {})


def _check_writer(factory: Callable[..., Any]) -> str:
    from pagedcore.execution.quantizing.writer import WeightWriter, WriterOptions
    from pagedcore.testing.writer_kit import check_writer

    writer = factory(WriterOptions())
    _check_protocol(writer, WeightWriter)
    return check_writer(writer)


def _check_server(factory: Callable[..., Any]) -> str:
    return _check_arguments(factory, None, None)


def _check_arguments(factory: Callable[..., Any], *arguments: Any) -> str:
    """Raise PluginError for a factory that could not be called with these."""
    try:
        inspect.signature(factory).bind(*arguments)
    except TypeError as error:
        raise PluginError(f"it cannot be called as the hook says: {error}") from None
    return "can be called"


def _check_protocol(thing: object, protocol: type) -> None:
    wanted = {
        name
        for kind in protocol.__mro__
        if getattr(kind, "_is_protocol", False)
        for name in {*vars(kind), *inspect.get_annotations(kind)}
        if not name.startswith("_")
    }
    missing = sorted(name for name in wanted if not hasattr(thing, name))
    if missing:
        raise PluginError(f"{type(thing).__name__} lacks {', '.join(missing)}")


_SIMPLE: dict[str, Callable[[Callable[..., Any]], str]] = {
    "pagedcore_models": _check_model,
    "pagedcore_backends": _check_backend,
    "pagedcore_sources": _check_source,
    "pagedcore_policies": _check_policy,
    "pagedcore_logits_processors": _check_processor,
    "pagedcore_quantizers": _check_quantizer,
    "pagedcore_kv_formats": _check_kv_format,
    "pagedcore_weight_writers": _check_writer,
    "pagedcore_servers": _check_server,
}
"""The first check of each thing that is offered, by hook."""
