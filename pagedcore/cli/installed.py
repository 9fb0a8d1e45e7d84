"""Installed plugins: what each one offers, and which do not load. No tensors are needed for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from pagedcore import hookspecs
from pagedcore.errors import PagedcoreError
from pagedcore.plugins import GROUP, collect, register

OBSERVERS = {
    "pagedcore_step_finished": "steps",
    "pagedcore_request_finished": "requests",
    "pagedcore_routes": "HTTP routes",
}
"""Hooks that offer no parts by name, and what a plugin does there."""

CASES = ("pagedcore_model_cases", "pagedcore_quantizer_cases")
OFFERS = [
    name
    for name in vars(hookspecs)
    if name.startswith("pagedcore_") and name not in {*OBSERVERS, *CASES}
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A plugin, or something about several, and what to do where it is not as it should be."""

    is_ok: bool
    what: str
    remedy: str = ""


def examine() -> Iterator[Examined]:
    """Load every plugin, one by one, and then look at what they offer together."""
    plugins: dict[str, object] = {}
    for entry in installed():
        what = f"{entry.name} from {origin(entry)}"
        try:
            offers(entry)
            plugins[entry.name] = entry.load()
            yield Examined(is_ok=True, what=what)
        except Exception as error:
            remedy = f"Fix or uninstall it, or start with --disable-plugin {entry.name}."
            yield Examined(is_ok=False, what=f"{what}: {describe(error)}", remedy=remedy)
    manager = register(plugins)
    for hook in OFFERS:
        try:
            collect(manager, hook)
        except PagedcoreError as error:
            yield Examined(is_ok=False, what=str(error))


def installed() -> list[EntryPoint]:
    """Their entry points, by name."""
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


def offers(entry: EntryPoint) -> dict[str, list[str]]:
    """Names by kind; raises what keeps the plugin from loading or answering."""
    manager = register({entry.name: entry.load()})
    found = {_kind(hook): sorted(collect(manager, hook)) for hook in OFFERS}
    seen = [what for hook, what in OBSERVERS.items() if getattr(manager.hook, hook).get_hookimpls()]
    found["observer"] = seen
    return {kind: names for kind, names in found.items() if names}


def _kind(hook: str) -> str:
    singular = hook.removeprefix("pagedcore_").replace("policies", "policy")
    return singular.removesuffix("s").replace("_", " ")


def origin(entry: EntryPoint) -> str:
    """The distribution that a plugin came with, and its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"


def describe(error: Exception) -> str:
    """An error in one line, with its class where nobody raised it on purpose."""
    return str(error) if isinstance(error, PagedcoreError) else f"{type(error).__name__}: {error}"
