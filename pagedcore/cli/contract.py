"""What `pagedcore plugins test` asks of each thing that a plugin offers."""

import inspect
from collections.abc import Callable
from typing import Any

from pagedcore.errors import ConfigError, PluginError


def check_offer(hook: str, factory: Any) -> str:
    """Make what is offered where that needs no model, and look for what its protocol asks.

    Returns a remark, or ""; raises PluginError, or what the factory raised.
    """
    if not callable(factory):
        raise PluginError(f"a factory is needed, not {factory!r}")
    check = _CHECKS.get(hook)
    return check(factory) if check else ""


def _check_model(factory: Callable[[], Any]) -> str:
    model = factory()
    if not isinstance(model, type):
        raise PluginError(f"the factory must return a class, not {model!r}")
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

    _check_protocol(factory(), Policy)
    return ""


def _check_quantizer(factory: Callable[..., Any]) -> str:
    return _check_arguments(factory, {})


def _check_server(factory: Callable[..., Any]) -> str:
    return _check_arguments(factory, None, None)


def _check_arguments(factory: Callable[..., Any], *arguments: Any) -> str:
    """Raise PluginError for a factory that could not be called with these."""
    try:
        inspect.signature(factory).bind(*arguments)
    except TypeError as error:
        raise PluginError(f"it cannot be called as the hook says: {error}") from None
    return "can be called; making one needs a model"


def _check_protocol(thing: object, protocol: type) -> None:
    wanted = {name for name in vars(protocol) if not name.startswith("_")}
    wanted |= set(inspect.get_annotations(protocol))
    missing = sorted(name for name in wanted if not hasattr(thing, name))
    if missing:
        raise PluginError(f"{type(thing).__name__} lacks {', '.join(missing)}")


_CHECKS: dict[str, Callable[[Callable[..., Any]], str]] = {
    "pagedcore_models": _check_model,
    "pagedcore_backends": _check_backend,
    "pagedcore_sources": _check_source,
    "pagedcore_policies": _check_policy,
    "pagedcore_quantizers": _check_quantizer,
    "pagedcore_servers": _check_server,
}
