"""Find plugins, and collect what they offer."""

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

import pluggy

from pagedcore import hookspecs
from pagedcore.errors import PluginError, UnknownNameError

GROUP = "pagedcore"
CORE = "core"
"""The plugin that the core itself is: `pagedcore.builtin`."""


def load_plugins(disabled: Iterable[str] = (), only: Iterable[str] = ()) -> pluggy.PluginManager:
    """Return a manager holding every installed plugin but the `disabled` ones.

    With `only`, it holds those and `core`, without which nothing runs.

    Raises PluginError, naming plugin, distribution and remedy, for one that fails to load, answers
    a hook that does not exist, or asks for another version of the hook spec; and UnknownNameError
    for a name in either list that no plugin has.
    """
    manager = register({})
    blocked, wanted = set(disabled), set(only)
    installed = sorted(entry_points(group=GROUP), key=lambda e: e.name)
    for name in sorted((blocked | wanted) - {entry_point.name for entry_point in installed}):
        raise UnknownNameError("plugin", name, {entry_point.name for entry_point in installed})
    for entry_point in installed:
        if entry_point.name in blocked:
            continue
        if wanted and entry_point.name not in wanted | {CORE}:
            continue
        dist = entry_point.dist.name if entry_point.dist else "unknown"
        remedy = f"Fix or uninstall {dist}, or start with --disable-plugin {entry_point.name}."
        try:
            _register(manager, entry_point.name, entry_point.load())
        except Exception as error:
            raise PluginError(
                f"plugin {entry_point.name!r} from {dist} failed to load: "
                f"{type(error).__name__}: {error} {remedy}"
            ) from error
    return manager


def register(plugins: Mapping[str, object]) -> pluggy.PluginManager:
    """Return a manager holding just these plugins, by name; for programs that bring their own."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    for name, plugin in plugins.items():
        _register(manager, name, plugin)
    return manager


def _register(manager: pluggy.PluginManager, name: str, plugin: object) -> None:
    hookspecs.check_version(getattr(plugin, "pagedcore_requires", ""))
    manager.register(plugin, name=name)
    known = {hook for hook in vars(hookspecs) if hook.startswith("pagedcore_")}
    for caller in manager.get_hookcallers(plugin) or ():
        if caller.name not in known:  # a misspelled hook is an error, not a silence
            raise PluginError(str(UnknownNameError("hook", caller.name, known)))


def collect(manager: pluggy.PluginManager, hook: str) -> dict[str, Any]:
    """Merge the mappings that plugins return from `hook`; refuse a name offered twice."""
    merged: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for impl in getattr(manager.hook, hook).get_hookimpls():
        offered: Mapping[str, Any] = impl.function()
        for name, thing in offered.items():
            if name in owner:
                kind = _kind(hook)
                raise PluginError(
                    f"two plugins offer the {kind} {name!r}: {origin(owner[name])} and "
                    f"{origin(impl.plugin_name)}. Start with --disable-plugin for one of them."
                )
            merged[name], owner[name] = thing, impl.plugin_name
    return merged


def choose(manager: pluggy.PluginManager, hook: str, name: str) -> Any:
    """Return what a plugin offers under `name`; raises UnknownNameError with the nearest name."""
    offered = collect(manager, hook)
    if name not in offered:
        raise UnknownNameError(_kind(hook), name, offered)
    return offered[name]


def origin(plugin: str) -> str:
    """A plugin's name and, where it is an installed one, its distribution: what errors say."""
    for entry_point in entry_points(group=GROUP):
        if entry_point.name == plugin and entry_point.dist:
            return f"{plugin} from {entry_point.dist.name}"
    return plugin


def _kind(hook: str) -> str:
    """What a hook offers, in the singular: pagedcore_policies offers each "policy"."""
    many = hook.removeprefix("pagedcore_").replace("_", " ")
    return many.removesuffix("ies") + "y" if many.endswith("ies") else many.removesuffix("s")
