"""`pagedcore plugins`: what is installed, whether it loads, and whether it keeps its contract."""

from importlib.metadata import EntryPoint, entry_points

from cyclopts import App
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pagedcore import hookspecs
from pagedcore.cli.contract import check_offer
from pagedcore.errors import PagedcoreError, UnknownNameError
from pagedcore.plugins import GROUP, collect, register

app = App(name="plugins", help="Look at what is installed.")

HOOKS = [name for name in vars(hookspecs) if name.startswith("pagedcore_")]
OFFERS = [
    name for name in HOOKS if name not in {"pagedcore_step_finished", "pagedcore_model_cases"}
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


@app.command
def test(name: str) -> int:
    """Check that what one plugin offers can be made, and has what its protocol asks for.

    Parameters
    ----------
    name
        The plugin, as `pagedcore plugins list` shows it.
    """
    entries = {entry.name: entry for entry in _installed()}
    if name not in entries:
        raise UnknownNameError("plugin", name, entries)
    num_failed = 0
    try:
        manager = register({name: entries[name].load()})
        offers = [(hook, *item) for hook in OFFERS for item in collect(manager, hook).items()]
    except Exception as error:
        _say("failed", f"{name} does not load: {_describe(error)}")
        return 1
    for hook, offer, factory in offers:
        try:
            remark = check_offer(hook, factory)
            _say("ok", f"{_kind(hook)} {offer}" + (f": {remark}" if remark else ""))
        except Exception as error:
            num_failed += 1
            _say("failed", f"{_kind(hook)} {offer}: {_describe(error)}")
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
    if manager.hook.pagedcore_step_finished.get_hookimpls():
        offers["observer"] = ["steps"]
    return {kind: names for kind, names in offers.items() if names}


def _kind(hook: str) -> str:
    singular = hook.removeprefix("pagedcore_").replace("policies", "policy")
    return singular.removesuffix("s").replace("_", " ")


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, PagedcoreError) else f"{type(error).__name__}: {error}"
