"""`pagedcore plugins`: what is installed, whether it loads, and whether it keeps its contract."""

import os
from importlib.metadata import EntryPoint, entry_points

from cyclopts import App
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pagedcore import hookspecs
from pagedcore.errors import PagedcoreError, UnknownNameError
from pagedcore.plugins import GROUP, collect, register
from pagedcore.testing.plugin_checks import INTERPRETED, plugin_checks

app = App(name="plugins", help="Look at what is installed.")

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


@app.command(name="list")
def show() -> int:
    """List installed plugins and what each one offers."""
    table = Table("plugin", "from", "offers")
    for entry in _installed():
        try:
            offers = "\n".join(
                f"{kind}: {', '.join(names)}" for kind, names in _offers(entry).items()
            )
        except Exception as error:
            offers = f"does not load: {_describe(error)} (see `pagedcore plugins doctor`)"
        table.add_row(entry.name, _origin(entry), escape(offers))
    Console().print(table)
    return 0


@app.command
def doctor() -> int:
    """Load every plugin, and look for names that two offer. The status is 1 if one fails."""
    plugins: dict[str, object] = {}
    num_problems = 0
    for entry in _installed():
        try:
            _offers(entry)
            plugins[entry.name] = entry.load()
            _say("ok", f"{entry.name} from {_origin(entry)}")
        except Exception as error:
            num_problems += 1
            remedy = f"Fix or uninstall it, or start with --disable-plugin {entry.name}."
            _say("failed", f"{entry.name} from {_origin(entry)}: {_describe(error)}. {remedy}")
    manager = register(plugins)
    for hook in OFFERS:
        try:
            collect(manager, hook)
        except PagedcoreError as error:
            num_problems += 1
            _say("failed", str(error))
    print(f"plugins: {len(_installed())}, problems: {num_problems}")
    return 1 if num_problems else 0


@app.command(name="test")
def check(name: str, *, backend: tuple[str, ...] = ("torch",), serve: bool = False) -> int:
    """Put what one plugin promises to the test, on the CPU: see docs/plugins.md.

    Parameters
    ----------
    name
        The plugin, as `pagedcore plugins list` shows it.
    backend
        Where its models run. `triton` runs in Triton's interpreter.
    serve
        Start the servers that it offers, too.
    """
    entries = {entry.name: entry for entry in _installed()}
    if name not in entries:
        raise UnknownNameError("plugin", name, entries)
    if INTERPRETED in backend:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    try:
        checks = list(plugin_checks(name, entries[name].load(), backends=backend, serves=serve))
    except Exception as error:
        _say("failed", f"{name} does not load: {_describe(error)}")
        return 1
    num_failed = 0
    for promise in checks:
        try:
            remark = promise()
            _say("ok", f"{promise}: {remark}" if remark else str(promise))
        except Exception as error:
            num_failed += 1
            _say("failed", f"{promise}: {_describe(error)}")
    print(f"checks: {len(checks)}, failed: {num_failed}")
    return 1 if num_failed else 0


def _say(verdict: str, text: str) -> None:
    color = "green" if verdict == "ok" else "red"
    Console(highlight=False).print(f"[{color}]{verdict:7}[/] {escape(text)}", soft_wrap=True)


def _installed() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


def _offers(entry: EntryPoint) -> dict[str, list[str]]:
    """Names by kind; raises what keeps the plugin from loading or answering."""
    manager = register({entry.name: entry.load()})
    offers = {_kind(hook): sorted(collect(manager, hook)) for hook in OFFERS}
    seen = [what for hook, what in OBSERVERS.items() if getattr(manager.hook, hook).get_hookimpls()]
    offers["observer"] = seen
    return {kind: names for kind, names in offers.items() if names}


def _kind(hook: str) -> str:
    singular = hook.removeprefix("pagedcore_").replace("policies", "policy")
    return singular.removesuffix("s").replace("_", " ")


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, PagedcoreError) else f"{type(error).__name__}: {error}"
